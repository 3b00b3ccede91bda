"""Regular expressions of others: what would take for ever is refused before it is matched, what people write is not."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig
from peft.utils.other import get_pattern_key

from loraxs_ext.checkpoint.lora_folder import read_lora
from loraxs_ext.checkpoint.packing import manifest_of
from loraxs_ext.peft import LoraXSConfig
from loraxs_ext.peft.patterns import check_patterns

from .folders import Folders
from .test_packing import another, rewrite

# Of the names of modules, this one tries every cut.
HANGS = r"([\w.]+)+!"
FIELDS = ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_pattern", "modules_to_save")


@pytest.fixture(autouse=True)
def hard_timeout() -> Iterator[None]:
    """Python looks for signals while it matches."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError("a pattern was matched for half a minute")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def in_field(field: str, pattern: str) -> dict[str, Any]:
    shapes = {"rank_pattern": {pattern: 4}, "alpha_pattern": {pattern: 4}, "modules_to_save": [pattern]}
    return {field: shapes.get(field, pattern)}


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a+)+$",
        r"([a-z_]+\.?)*$",
        r"(\w+)*\.q_proj",
        r"((a|ab)(c|bcd))+",
        r"(a|a)*$",
        r"(?:a*){2,3}b",
        r"(?=(a+)+$)b",
        r"(?i:(a+)+)$",
        r".*.*.*.*.*.*x",
        "(a|a)" * 40,
        "a?" * 40 + "a" * 40,
        r"(?:){4000000000}",
        r"(?:a?){4000000000}",
        r"(.*)\1(.+)+",
    ],
)
@pytest.mark.parametrize("field", FIELDS)
def test_what_never_ends_is_refused(field: str, pattern: str) -> None:
    message = f"{field}: expected patterns that are matched in reasonable time, got {re.escape(repr(pattern)[:100])}"
    with pytest.raises(ValueError, match=message):
        check_patterns(in_field(field, pattern))


@pytest.mark.parametrize("pattern", ["(", "a)(b", "*", "(" * 5000])
@pytest.mark.parametrize("field", FIELDS)
def test_what_is_no_expression_is_refused(field: str, pattern: str) -> None:
    with pytest.raises(ValueError, match=f"{field}: expected a regular expression, got '"):
        check_patterns(in_field(field, pattern))


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "all-linear",
        r"^model\.layers\.0\.self_attn\.q_proj",
        r".*\.(q|k|v|o)_proj$",
        r"layers\.\d+\.mlp\.experts\.\d+\.(gate|up)_proj",
        r"layers\.(1|2|3|[4-9]|1[0-9])\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
        r"^(?!.*vision).*(?:q_proj|v_proj).*$",
        r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
        r"(?:.*?(?:vision|image|visual|language|text).*?(?:self_attn|attention|mlp).*?(?:q_proj|k_proj|gate_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:q_proj|k_proj|down_proj))",
        "|".join(re.escape(f"model.layers.{i}.mlp.up_proj") for i in range(2000)),
    ],
)
def test_what_people_write_is_not(pattern: str) -> None:
    check_patterns({"target_modules": pattern})
    check_patterns({"layers_pattern": ["layers", "h"], "modules_to_save": ["lm_head"], "exclude_modules": pattern})
    if pattern.count(".*") < 4:
        check_patterns({"rank_pattern": {pattern: 8}})


def test_what_is_not_refused_ends() -> None:
    for pattern in (".*.*.*x", ".*a.*a.*x", "a*a*a*x", "(a|a)" * 15 + "x", "a?" * 15 + "a" * 15 + "x"):
        check_patterns({"rank_pattern": {pattern: 1}})
        start = time.monotonic()
        get_pattern_key([pattern], "a" * 128)
        assert time.monotonic() - start < 20  # milliseconds, in truth


def test_many_modules_and_many_patterns() -> None:
    names = {f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(60) for j in range(40)}
    fields = {"alpha_pattern": {f"^{re.escape(name)}": 1.0 for name in names}}
    check_patterns(fields)
    check_patterns(fields, names)
    fields = {"alpha_pattern": {f"{i}.*": 1.0 for i in range(2000)}}
    check_patterns(fields)
    check_patterns(fields, ["model.layers.0.mlp.up_proj"])
    with pytest.raises(ValueError, match="which, with those before, may be tried in 2e[+]09 ways"):
        check_patterns(fields, names)
    with pytest.raises(ValueError, match="may be tried"):
        check_patterns({"rank_pattern": {".*x": 1}}, ["x" * 100_000])


@pytest.mark.parametrize("field", FIELDS)
def test_a_folder_is_refused_by_name(made: Folders, tmp_path: Path, field: str) -> None:
    folder = rewrite(another(made, tmp_path / "one"), tmp_path / "bad", **in_field(field, HANGS))
    with pytest.raises(ValueError, match=rf"bad.*{field}: expected patterns .* got {re.escape(repr(HANGS))}"):
        manifest_of(folder)


@pytest.mark.parametrize("kind", [LoraXSConfig, PeftConfig])
@pytest.mark.parametrize("field", FIELDS)
def test_a_configuration_on_its_own_too(made: Folders, tmp_path: Path, kind: type[PeftConfig], field: str) -> None:
    folder = rewrite(made.adapter, tmp_path / "bad", **in_field(field, HANGS))
    with pytest.raises(ValueError, match=rf"{field}: expected patterns .* got {re.escape(repr(HANGS))}"):
        kind.from_pretrained(folder)


def test_a_plain_lora_too(made: Folders, tmp_path: Path) -> None:
    folder = rewrite(another(made, tmp_path / "one"), tmp_path / "bad", peft_type="LORA", rank_pattern={HANGS: 4})
    with pytest.raises(ValueError, match=r"rank_pattern: expected patterns that are matched in reasonable time"):
        read_lora(folder)
