"""A tiny random checkpoint with the real tokenizer and every file that ``LLM`` reads."""

import json
import shutil
from pathlib import Path
from typing import Any

from oracle import TinyCase, build_oracle, save_oracle
from paths import EIGHT_B

IMAGE = 32001
LATENTS = 4


def write_checkpoint(
    folder: Path,
    *,
    vocab_size: int = 32003,
    tied: bool = False,
    chat: bool = True,
    window: int = 4096,
    max_positions: int = 512,
    **saving: Any,
) -> Any:
    """Write the checkpoint to ``folder`` and return the oracle.

    The checkpoint is like idefics2-8b or, without ``chat``, like idefics2-8b-base.
    """
    case = TinyCase(
        "whole",
        ((),),
        (1,),
        vision={"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 16},
        perceiver={"hidden_size": 16, "resampler_n_latents": LATENTS, "resampler_head_dim": 8},
        text={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "vocab_size": vocab_size,
            "max_position_embeddings": max_positions,
            "sliding_window": window,
        },
        tied=tied,
    )
    config = case.config()
    config.image_token_id = IMAGE
    oracle = build_oracle(case, config=config)
    if saving:
        oracle.save_pretrained(folder, **saving)
    else:
        save_oracle(oracle, folder)
    for name in ("generation_config", "preprocessor_config", "tokenizer", "tokenizer_config"):
        shutil.copy(EIGHT_B / f"{name}.json", folder)
    processor = json.loads((EIGHT_B / "processor_config.json").read_text())
    processor["image_seq_len"] = LATENTS
    (folder / "processor_config.json").write_text(json.dumps(processor))
    edit_json(
        folder / "preprocessor_config.json",
        size={"longest_edge": 112, "shortest_edge": 42},
        do_image_splitting=False,
    )
    if not chat:
        _forget_turns(folder)
    return oracle


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON object; a value of None removes the key."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def _forget_turns(folder: Path) -> None:
    """Remove ``<end_of_utterance>`` and the template, which idefics2-8b-base does not have."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    added = [token for token in tokenizer["added_tokens"] if token["id"] < 32002]
    edit_json(folder / "tokenizer.json", added_tokens=added)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    decoder = {id: t for id, t in settings["added_tokens_decoder"].items() if int(id) < 32002}
    edit_json(
        folder / "tokenizer_config.json",
        added_tokens_decoder=decoder,
        additional_special_tokens=["<fake_token_around_image>", "<image>"],
    )
    edit_json(folder / "processor_config.json", chat_template=None)
    edit_json(folder / "generation_config.json", eos_token_id=2)
