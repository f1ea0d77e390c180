"""Published weights come from a hub, by name, whole and checked; everything that can go wrong there is one line.

The hub is a server on this machine; its files have exactly the names and shapes of the originals, filled by a rule.
"""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from torch import Tensor

from evmamba import UserError, create_model, list_models
from evmamba.pretrained import Source, fetch, parse_source, published

from . import hub_server

SCHEMAS = {
    "efficientvmamba_t": "schema_t.json",
    "efficientvmamba_s": "schema_s.json",
    "efficientvmamba_b": "schema_b.json",
    "vim_tiny": "schema_vim_ti.json",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.Hub]:
    with hub_server.serving() as hub:
        hub_server.point_at(hub.endpoint, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
        yield hub


@pytest.fixture(scope="session")
def original(golden_folder: Path, fill: object) -> Callable[[str], dict[str, Tensor]]:
    """The original network's state dict by its published schema, filled by the golden rule."""
    made: dict[str, dict[str, Tensor]] = {}

    def weights(name: str) -> dict[str, Tensor]:
        if name not in made:
            rows = json.loads((golden_folder / SCHEMAS[name]).read_text())["state_dict"]
            made[name] = {
                row["key"]: torch.from_numpy(np.array(fill.value(row["key"], tuple(row["shape"])))) for row in rows
            }
        return made[name]

    return weights


def file_of(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def put(hub: hub_server.Hub, name: str, content: bytes) -> None:
    row = published()[name]
    hub.add(row["repository"], row["revision"], row["file"], content)


@pytest.fixture
def tiny_hub(hub: hub_server.Hub, original: Callable[[str], dict[str, Tensor]]) -> hub_server.Hub:
    """EfficientVMamba-T as its author publishes it: raw and averaged weights, and what else a training keeps."""
    weights = original("efficientvmamba_t")
    raw = {f"module.{key}": -value for key, value in weights.items()}
    put(hub, "efficientvmamba_t", file_of({"model": raw, "model_ema": weights, "optimizer": {}, "epoch": 299}))
    return hub


def test_every_network_of_the_table_is_one_of_ours_and_timm_knows_its_weights():
    assert set(published()) <= set(list_models())
    assert set(published()) <= set(timm.list_models(pretrained=True))
    assert all(row.keys() == {"repository", "revision", "file", "license"} for row in published().values())


def test_a_name_brings_the_published_numbers(tiny_hub, golden):
    arrays = golden("logits_t_224")
    for create in (create_model, timm.create_model):
        with torch.no_grad():
            logits = create("efficientvmamba_t", pretrained=True).eval()(torch.from_numpy(arrays["x"]))
        assert np.abs(logits.double().numpy() - arrays["logits_f64"]).max() <= 5e-6


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_published_network_loads_strictly_from_its_revision(hub, original, name):
    put(hub, name, file_of({"model": original(name)}))
    model = create_model(name, pretrained=True)
    row = published()[name]
    assert f"GET /{row['repository']}/resolve/{row['revision']}/{row['file']}" in hub.requests
    state = model.state_dict()
    assert all(torch.equal(state[ours], original(name)[theirs]) for ours, theirs in model.original_names().items())


def test_what_was_fetched_once_is_used_offline(tiny_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set; run `hf download TerryPei/EfficientVMamba-Tiny eff"):
        create_model("efficientvmamba_t", pretrained=True)
    program = (
        "import evmamba; print(evmamba.create_model('efficientvmamba_t', pretrained=True).stem.conv.bias.tolist())"
    )
    environment = os.environ | {"HF_ENDPOINT": tiny_hub.endpoint, "HF_HUB_CACHE": constants.HF_HUB_CACHE}
    command = [sys.executable, "-c", program]
    online = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert online.returncode == 0, online.stderr
    asked = len(tiny_hub.requests)
    assert asked
    offline = create_model("efficientvmamba_t", pretrained=True)
    assert len(tiny_hub.requests) == asked
    assert offline.stem.conv.bias.tolist() == json.loads(online.stdout)


def test_without_network_one_line_says_what_to_do(monkeypatch, tmp_path):
    hub_server.point_at("http://127.0.0.1:9", monkeypatch)  # nothing listens there
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(UserError) as caught:
        create_model("efficientvmamba_t", pretrained=True, cache_dir=tmp_path)
    message = str(caught.value)
    assert "http://127.0.0.1:9 cannot be reached" in message
    assert "hf download TerryPei/EfficientVMamba-Tiny efficient_vmamba_tiny.ckpt --revision main" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf-hub:some/body:a.pth", "the hub has no repository some/body"),
        ("hf-hub:user/net@v9:a.pth", "user/net has no revision v9"),
        ("hf-hub:user/net:b.pth", "there is no b.pth of user/net at revision main"),
        ("hf-hub:user/net", r"user/net has 2 files of weights \(a.pth, c.ckpt\); name one"),
        ("hf-hub:user/net..x:a.pth", "'user/net..x' cannot be a repository"),
        ("hf-hub:net", "'hf-hub:net' is no source of weights"),
        ("nowhere.pth", "no checkpoint file at nowhere.pth"),
    ],
)
def test_a_wrong_source_is_one_line(hub, source, message):
    hub.add("user/net", "main", "a.pth", b"")
    hub.add("user/net", "main", "c.ckpt", b"")
    with pytest.raises(UserError, match=message) as caught:
        create_model("efficientvmamba_t", pretrained=source)
    assert "\n" not in str(caught.value)


def test_a_download_that_breaks_off_is_continued(tiny_hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the attempts
    tiny_hub.burst = 20 << 20
    create_model("efficientvmamba_t", pretrained=True)
    assert len([request for request in tiny_hub.requests if request.startswith("GET")]) > 1


def test_a_download_that_does_not_end_is_not_taken_for_the_file(tiny_hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    tiny_hub.end = 0.3
    with pytest.raises(UserError, match=r"cannot download efficient_vmamba_tiny\.ckpt of TerryPei") as caught:
        create_model("efficientvmamba_t", pretrained=True)
    assert "\n" not in str(caught.value)
    tiny_hub.end = 1.0
    create_model("efficientvmamba_t", pretrained=True)


def test_weights_of_another_network_are_refused(hub, original):
    put(hub, "efficientvmamba_t", file_of(original("efficientvmamba_s")))
    with pytest.raises(UserError, match=r"does not fit the model: .* of another shape: stem\.conv\.weight \[64, 3"):
        create_model("efficientvmamba_t", pretrained=True)


def test_code_in_a_file_does_not_run(hub, tmp_path):
    class Malice:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    put(hub, "efficientvmamba_t", file_of({"model": {"patch_embed.0.weight": Malice()}}))
    with pytest.raises(UserError, match="holds Python objects besides tensors"):
        create_model("efficientvmamba_t", pretrained=True)
    with pytest.raises(UserError, match="holds Python objects besides tensors"):
        timm.create_model("efficientvmamba_t", pretrained=True)
    assert not (tmp_path / "ran").exists()


def test_other_classes_channels_and_the_pyramid(tiny_hub, original):
    weights = original("efficientvmamba_t")
    stem = weights["patch_embed.0.weight"]
    for create in (create_model, timm.create_model):
        gray = create("efficientvmamba_t", pretrained=True, num_classes=7, in_chans=1)
        assert gray(torch.randn(2, 1, 40, 40)).shape == (2, 7)
        torch.testing.assert_close(gray.stem.conv.weight, stem.sum(1, keepdim=True))
        assert torch.equal(gray.head.norm.weight, weights["classifier.norm.weight"])
        four = create("efficientvmamba_t", pretrained=True, in_chans=4, num_classes=0)
        torch.testing.assert_close(four.stem.conv.weight, torch.cat([stem, stem[:, :1]], 1) * 3 / 4)
        pyramid = create("efficientvmamba_t", pretrained=True, features_only=True, out_indices=(1, 2))
        assert torch.equal(pyramid.stem.conv.weight, stem)
        assert [m.shape[1] for m in pyramid(torch.randn(1, 3, 64, 64))] == [96, 192]


def test_vims_positions_are_resized_to_another_image_size(hub, original):
    put(hub, "vim_tiny", file_of({"model": original("vim_tiny")}))
    image = torch.randn(1, 3, 128, 128)
    own, resized = (create_model("vim_tiny", pretrained=True, **o).eval() for o in ({}, {"image_size": 128}))
    assert resized.pos_embed.shape[1] == 65
    with torch.no_grad():
        assert torch.equal(resized(image), own(image))


@pytest.mark.parametrize("name", ["vmamba_tiny", "efficientvmamba_t-ss2d"])
def test_networks_without_published_weights_get_none_that_happen_to_fit(tiny_hub, name):
    """SS2D has ES2D's parameters: the published weights fit and mean nothing to it."""
    with pytest.raises(UserError, match=f"no published weights are known for {name}, only for efficientvmamba_t"):
        create_model(name, pretrained=True)
    with pytest.raises(UserError, match=f"no published weights are known for {name}"):
        timm.create_model(name.split("-")[0], pretrained=True, **({"scan": "ss2d"} if "-" in name else {}))


def test_any_source_of_the_users(tiny_hub, original, tmp_path):
    weights = {key: value + 1 for key, value in original("efficientvmamba_t").items()}
    (tmp_path / "own.pth").write_bytes(file_of(weights))
    tiny_hub.add("user/net", "v2", "only.ckpt", file_of(weights))
    sources = {
        str(tmp_path / "own.pth"): {"file": str(tmp_path / "own.pth")},
        "hf-hub:user/net@v2": {"hf_hub_id": "user/net@v2"},
        "hf-hub:user/net@v2:only.ckpt": {"hf_hub_id": "user/net@v2", "hf_hub_filename": "only.ckpt"},
        f"{tiny_hub.endpoint}/user/net/resolve/v2/only.ckpt?x=1": {},
    }
    for source, overlay in sources.items():
        models = [create_model("efficientvmamba_t", pretrained=source)]
        if overlay:
            overlay = {"hf_hub_id": None, "hf_hub_filename": None} | overlay
            models.append(timm.create_model("efficientvmamba_t", pretrained=True, pretrained_cfg_overlay=overlay))
        for model in models:
            assert torch.equal(model.stem.conv.weight, weights["patch_embed.0.weight"]), source
    with pytest.raises(UserError, match="not both"):
        create_model("efficientvmamba_t", pretrained=True, checkpoint_path=tmp_path / "own.pth")


def test_a_url_is_fetched_once_and_never_in_part(tiny_hub, tmp_path, monkeypatch):
    tiny_hub.add("user/net", "main", "a.pth", file_of({"w": torch.arange(1000.0)}))
    source = parse_source(f"{tiny_hub.endpoint}/user/net/resolve/main/a.pth")
    tiny_hub.end = 0.5
    with pytest.raises(UserError, match=r"broke off after \d+ of \d+ bytes|cannot download"):
        fetch(source, tmp_path)
    assert not list(tmp_path.iterdir())
    tiny_hub.end = 1.0
    path = fetch(source, tmp_path)
    tiny_hub.requests.clear()
    assert fetch(source, tmp_path) == path
    assert not tiny_hub.requests
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        fetch(Source(url=f"{tiny_hub.endpoint}/other.pth"), tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match=r"cannot download http.*404"):
        fetch(Source(url=f"{tiny_hub.endpoint}/other/resolve/main/a.pth"), tmp_path)


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("hf-hub:a/b", Source(repository="a/b")),
        ("hf-hub:a/b@v1", Source(repository="a/b", revision="v1")),
        ("hf-hub:a/b@refs/pr/1:sub/w.pth", Source(repository="a/b", revision="refs/pr/1", file="sub/w.pth")),
        ("https://x.org/w.pth", Source(url="https://x.org/w.pth")),
        ("a/b", Source(path=Path("a/b"))),
        (Path("w.pth"), Source(path=Path("w.pth"))),
    ],
    ids=str,
)
def test_how_sources_are_written(text, source):
    assert parse_source(text) == source
