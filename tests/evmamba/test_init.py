"""The package's surface, looked up where it is first used."""

import evmamba


def test_import_is_the_public_surface():
    assert evmamba.__all__ == sorted(evmamba.__all__)
    assert [name for name in evmamba.__all__ if getattr(evmamba, name).__name__ != name] == []
    assert set(evmamba.__all__) <= set(dir(evmamba))


def test_there_are_no_other_names():
    assert not hasattr(evmamba, "create_modell")
