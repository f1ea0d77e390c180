"""The original implementation's names of parameters, and ours, by one table in both directions."""

import re
from collections.abc import Mapping

# Theirs -> ours. {i} stage, {j} block counted from 0, {n} block counted from 1 (the original's InRes stages start with
# a placeholder module), {end} the place after the blocks of such a stage, which holds the merging.
ORIGINAL_NAMES = (
    ("patch_embed.0", "stem.conv"),
    ("patch_embed.2", "stem.norm"),
    ("layers.{i}.blocks.{j}.norm", "stages.{i}.blocks.{j}.norm"),
    ("layers.{i}.blocks.{j}.op", "stages.{i}.blocks.{j}.global_branch"),
    ("layers.{i}.blocks.{j}.conv_branch.0", "stages.{i}.blocks.{j}.local_branch.depthwise"),
    ("layers.{i}.blocks.{j}.conv_branch.1", "stages.{i}.blocks.{j}.local_branch.norm"),
    ("layers.{i}.blocks.{j}.conv_branch.3", "stages.{i}.blocks.{j}.local_branch.pointwise"),
    ("layers.{i}.blocks.{j}.se.norm", "stages.{i}.blocks.{j}.se.norm"),
    ("layers.{i}.blocks.{j}.se.global_reduce", "stages.{i}.blocks.{j}.se.reduce"),
    ("layers.{i}.blocks.{j}.se.channel_select", "stages.{i}.blocks.{j}.se.expand"),
    ("layers.{i}.downsample", "stages.{i}.merge"),
    ("layers.{i}.{n}.conv_pw.0", "stages.{i}.blocks.{j}.expand"),
    ("layers.{i}.{n}.conv_pw.1", "stages.{i}.blocks.{j}.expand_norm"),
    ("layers.{i}.{n}.conv_dw.0", "stages.{i}.blocks.{j}.depthwise"),
    ("layers.{i}.{n}.conv_dw.1", "stages.{i}.blocks.{j}.depthwise_norm"),
    ("layers.{i}.{n}.se.conv_reduce", "stages.{i}.blocks.{j}.se.reduce"),
    ("layers.{i}.{n}.se.conv_expand", "stages.{i}.blocks.{j}.se.expand"),
    ("layers.{i}.{n}.conv_pw2.0", "stages.{i}.blocks.{j}.project"),
    ("layers.{i}.{n}.conv_pw2.1", "stages.{i}.blocks.{j}.project_norm"),
    ("layers.{i}.{end}", "stages.{i}.merge"),
    ("outnorm{i}", "outnorm{i}"),
    ("classifier.norm", "head.norm"),
    ("classifier.head", "head.fc"),
)

# Names of the original's first versions -> those of its present ones.
OLDER_NAMES = (
    (re.compile(r"^patch_embed\.proj\."), "patch_embed.0."),
    (re.compile(r"^patch_embed\.norm\."), "patch_embed.2."),
    (re.compile(r"^(layers\.\d+\.blocks\.\d+)\.ln_1\."), r"\1.norm."),
    (re.compile(r"^(layers\.\d+\.blocks\.\d+)\.self_attention\."), r"\1.op."),
    (re.compile(r"^(norm|head)\.(weight|bias)$"), r"classifier.\1.\2"),
)


def from_original(name: str) -> str:
    """Translate one of the original's names, present or older; other names stay as they are."""
    for older, present in OLDER_NAMES:
        name = older.sub(present, name)
    for pattern, ours in _THEIR_PATTERNS:
        if found := pattern.match(name):
            numbers = {key: int(value) for key, value in found.groupdict().items() if key != "rest"}
            if "n" in numbers:
                numbers["j"] = numbers["n"] - 1
            return f"{ours.format(**numbers)}.{found['rest']}"
    return name


def to_original(name: str, flat_stages: Mapping[int, int]) -> str:
    """Translate one of our names; `flat_stages` has the depth of each InRes stage."""
    for pattern, theirs in _OUR_PATTERNS:
        if found := pattern.match(name):
            numbers = {key: int(value) for key, value in found.groupdict().items() if key != "rest"}
            is_flat = numbers.get("i") in flat_stages
            if theirs.startswith("layers.") and is_flat != ("{n}" in theirs or "{end}" in theirs):
                continue
            if is_flat:
                numbers["end"] = flat_stages[numbers["i"]] + 2
                numbers["n"] = numbers.get("j", 0) + 1
            return f"{theirs.format(**numbers)}.{found['rest']}"
    raise KeyError(name)


def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    return re.compile("^" + re.sub(r"\{(\w+)\}", r"(?P<\1>\\d+)", escaped) + r"\.(?P<rest>.+)$")


_THEIR_PATTERNS = [(_pattern(theirs), ours) for theirs, ours in ORIGINAL_NAMES]
_OUR_PATTERNS = [(_pattern(ours), theirs) for theirs, ours in ORIGINAL_NAMES]
