"""Kinds of checkpoints: chat models, the base model, and fine-tunes with other vocabularies."""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from idefics2_engine import LLM, SamplingParams
from idefics2_engine.errors import CheckpointError, ConfigError, PromptError
from oracle import random_image
from tiny_checkpoint import edit_json, write_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
# The engine never generates these tokens, for any checkpoint
BARRED = torch.tensor([32000, 32001])


def check_answers(folder: Path, oracle: Any, **settings: Any) -> LLM:
    """Load ``folder``, check that its greedy tokens are transformers', and return the engine."""
    llm = LLM(folder, device="cpu", dtype="float32", **settings)
    (output,) = llm.generate("The chicken sits on", GREEDY)
    ids = torch.tensor([output.prompt_token_ids])
    with torch.no_grad():
        for token in output.outputs[0].token_ids:
            logits = oracle(input_ids=ids).logits[0, -1].index_fill(0, BARRED, -torch.inf)
            assert int(logits.argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    (seen,) = llm.generate(
        {"prompt": "<image>What?", "multi_modal_data": {"image": random_image(90, 60)}}, GREEDY
    )
    assert len(seen.outputs[0].token_ids) == 8
    return llm


QUESTION = [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]


@pytest.mark.parametrize("kind", ["8b", "chatty"])
def test_chat_models_answer(kind: str, tmp_path: Path) -> None:
    oracle = write_checkpoint(tmp_path)
    # Some copies of this model have the template in the tokenizer's file, with splitting on
    if kind == "chatty":
        template = "{% for m in messages %}{{ m.role }}: {{ m.content[0].text }}{% endfor %}A:"
        edit_json(tmp_path / "processor_config.json", chat_template=None)
        edit_json(tmp_path / "tokenizer_config.json", chat_template=template)
        edit_json(tmp_path / "preprocessor_config.json", do_image_splitting=True)
    llm = check_answers(tmp_path, oracle)
    (output,) = llm.chat(QUESTION, GREEDY)
    wanted = {"8b": "User: What?<end_of_utterance>\nAssistant:", "chatty": "user: What?A:"}
    assert output.prompt == wanted[kind]
    assert llm.processor.image_config.split == (kind == "chatty")


def test_base_model_completes_and_refuses_chat(tmp_path: Path) -> None:
    oracle = write_checkpoint(tmp_path, vocab_size=32002, chat=False)
    llm = check_answers(tmp_path, oracle)
    assert llm.config.text.vocab_size == 32002
    assert llm.processor.template is None
    assert not llm.processor.image_config.split
    with pytest.raises(PromptError, match="chat"):
        llm.chat(QUESTION)


def test_base_model_accepts_the_chat_models_settings(tmp_path: Path) -> None:
    oracle = write_checkpoint(tmp_path, vocab_size=32002, chat=False)
    edit_json(
        tmp_path / "generation_config.json",
        eos_token_id=[2, 32002],
        bad_words_ids=[[32000], [32001], [32002], [5, 40000]],
    )
    check_answers(tmp_path, oracle)


def test_padded_vocabulary(tmp_path: Path) -> None:
    check_answers(tmp_path, write_checkpoint(tmp_path, vocab_size=32064))


def test_grown_vocabulary(tmp_path: Path) -> None:
    oracle = write_checkpoint(tmp_path, vocab_size=32003)
    with torch.no_grad():
        oracle.resize_token_embeddings(32010, mean_resizing=False)
    oracle.save_pretrained(tmp_path)
    llm = check_answers(tmp_path, oracle)
    assert llm.config.text.vocab_size == 32010


def test_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, vocab_size=32002)
    with pytest.raises(ConfigError, match="must have at most the model's 32002 tokens, got 32003"):
        LLM(tmp_path, device="cpu")


def test_config_that_does_not_match_the_weights_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, vocab_size=32010)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    edit_json(tmp_path / "config.json", text_config=text | {"vocab_size": 32003})
    with pytest.raises(ValueError, match=r"must have shape \(32003, 16\), got \(32010, 16\)"):
        LLM(tmp_path, device="cpu")


def test_tied_head(tmp_path: Path) -> None:
    llm = check_answers(tmp_path, write_checkpoint(tmp_path, tied=True))
    assert llm.model.lm_head is llm.model.text.embedding


def test_adapter_gives_pefts_answers(tmp_path: Path) -> None:
    oracle = write_checkpoint(tmp_path / "base")
    plain = LLM(tmp_path / "base", device="cpu").generate("The chicken sits on", GREEDY)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained: Any = peft.get_peft_model(
            oracle, peft.LoraConfig(r=4, target_modules="all-linear")
        )
        with torch.no_grad():
            for parameter in trained.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.3)
        trained.save_pretrained(str(tmp_path / "lora"))
    llm = check_answers(tmp_path / "base", trained, adapter=tmp_path / "lora", check_finite=True)
    changed = llm.generate("The chicken sits on", GREEDY)[0]
    assert changed.outputs[0].token_ids != plain.outputs[0].token_ids


def test_adapter_is_verified(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    lora = tmp_path / "lora"
    lora.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (lora / name).write_bytes(b"{}")
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    (tmp_path / "SHA256SUMS").write_text(f"{digest}  model.safetensors\n")
    LLM(tmp_path, device="cpu", verify=True)
    with pytest.raises(CheckpointError) as caught:
        LLM(tmp_path, device="cpu", adapter=lora, verify=True)
    assert f"{lora / 'adapter_model.safetensors'}: has no checksum" in str(caught.value)
    (lora / "SHA256SUMS").write_text(f"{'0' * 64}  adapter_model.safetensors\n")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: checksum must be 0000"):
        LLM(tmp_path, device="cpu", adapter=lora, verify=True)
