"""The package's surface."""

import evmamba


def test_import_is_the_public_surface():
    assert evmamba.__all__ == sorted(evmamba.__all__)
    assert all(hasattr(evmamba, name) for name in evmamba.__all__)
