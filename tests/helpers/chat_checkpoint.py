"""A tiny random model behind the real tokenizer, with a window that is shorter than its prompts."""

import json
import shutil
from pathlib import Path
from typing import Any

from oracle import TinyCase, build_oracle, save_oracle
from paths import EIGHT_B

IMAGE = 32001
LATENTS = 4

CHAT = TinyCase(
    "chat",
    ((),),
    (1,),
    perceiver={"resampler_n_latents": LATENTS},
    text={"vocab_size": 32003, "sliding_window": 24, "max_position_embeddings": 512},
)


def write_chat_checkpoint(folder: Path) -> Any:
    """Write the checkpoint to ``folder`` and return transformers' model."""
    config = CHAT.config()
    config.image_token_id = IMAGE
    oracle = build_oracle(CHAT, config=config)
    save_oracle(oracle, folder)
    for file in EIGHT_B.glob("*.json"):
        if file.name not in ("config.json", "position_buckets.json", "tokenizer_cases.json"):
            shutil.copy(file, folder / file.name)
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    preprocessor |= {
        "size": {"longest_edge": 112, "shortest_edge": 42},
        "do_image_splitting": False,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    processor = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(
        json.dumps(processor | {"image_seq_len": LATENTS})
    )
    return oracle
