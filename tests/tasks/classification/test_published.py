"""The protocol of published weights is timm's description of them, to the pixel."""

from pathlib import Path

import pytest
import timm
import torch
from timm.data import create_transform, resolve_data_config

from evmamba.errors import UserError
from evmamba.tasks.classification import ClassificationData
from evmamba.tasks.classification.published import published_protocol


@pytest.mark.parametrize("name", ["efficientvmamba_t", "resnet18", "mobilenetv3_large_100", "beit_base_patch16_224"])
def test_images_become_what_timm_makes_of_them(name: str):
    protocol = published_protocol(name)
    data = ClassificationData(num_workers=0, **protocol.options)
    protocol.apply(data)
    data.setup("test")
    image, _, path = data.val_set[0]
    config = resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict(), use_test_size=True)
    expected = create_transform(is_training=False, **config)(data.read_image(str(Path(path))))
    assert torch.equal(image, expected)
    assert f"{image.shape[-1]} x {image.shape[-1]}" in protocol.words


def test_an_unknown_network_is_named():
    with pytest.raises(UserError, match="unknown backbone 'resnet19'; did you mean"):
        published_protocol("resnet19")
