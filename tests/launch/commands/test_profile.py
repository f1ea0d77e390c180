"""`evmamba profile`."""

import json

import torch

from evmamba.launch import cli


def test_the_command_writes_the_same_numbers_everywhere(tmp_path, capsys):
    command = ["profile", "--backbones", "efficientvmamba_t,resnet18", "--resolutions", "32", "--batch-sizes", "1,2"]
    command += ["--modes", "eager,graph", "--seconds", "0.02", "--operators", "30", "--device", "cpu"]
    assert cli.main([*command, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    document = json.loads((tmp_path / "profile.json").read_text())
    markdown = (tmp_path / "profile.md").read_text()

    rows = document["rows"]
    assert [(row["batch_size"], row["mode"], row["backbone"]) for row in rows] == [
        (batch, mode, name)
        for batch in (1, 2)
        for mode in ("eager", "graph")
        for name in ("efficientvmamba_t", "resnet18")
    ]
    for row in rows:
        if row["mode"] == "eager":
            shown = f"{row['latency_ms']:.3g}" if row["latency_ms"] < 100 else f"{row['latency_ms']:.0f}"
            assert f"| {row['backbone']} | {shown} |" in markdown
            assert shown in printed
    assert "CUDA graphs need a GPU" in printed
    assert "CUDA graphs need a GPU" in markdown
    assert document["about"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert {share["kind"] for share in document["shares"]} == {"operator", "part"}
    for backbone in ("efficientvmamba_t", "resnet18"):
        assert 0.5 < sum(s["share"] for s in document["shares"] if (s["kind"], s["backbone"]) == ("part", backbone)) < 1
    assert "evmamba::scan2d" in [share["name"] for share in document["shares"]]
    assert (tmp_path / "profile.png").stat().st_size > 1000


def test_unknown_backbones_end_it_before_anything_is_measured(tmp_path, capsys):
    assert cli.main(["profile", "--backbones", "resnet18,resnet19", "--output", str(tmp_path)]) == 2
    assert "resnet19" in capsys.readouterr().err
    assert not (tmp_path / "profile.json").exists()
