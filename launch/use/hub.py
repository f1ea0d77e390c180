"""Networks to and from folders and repositories in the Hugging Face hub's format."""

from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from evmamba.checkpoints import save_checkpoint
from evmamba.errors import UserError, first_line
from evmamba.launch.store.results import Result
from evmamba.launch.use.model_card import LICENSE, card_of
from evmamba.launch.use.networks import Network
from evmamba.model import EfficientVMamba, FeaturePyramid
from evmamba.pretrained import Source, fetch
from evmamba.tasks.plain_files import is_file, read_json

KINDS = {kind.__name__: kind for kind in (EfficientVMamba, FeaturePyramid)}
WEIGHTS_FILE = constants.SAFETENSORS_SINGLE_FILE
# Beside the constructor's arguments, which are all that from_pretrained needs.
KIND_KEY, CLASSES_KEY = "architecture", "class_names"


def push(
    network: Network, target: str, private: bool = False, result: Result | None = None, license: str = LICENSE
) -> str:
    """Write a network into a folder, or push it to a repository, with a model card.

    Args:
        network: an EfficientVMamba or its pyramid.
        target: a folder (starts with . or /, or exists), or ``user/repository``.
        private: of a new repository.
        result: a test of these weights, for the card.
        license: of the weights, the hub's identifier.

    Returns:
        Where it is.

    Raises:
        UserError: another kind of network, a folder that cannot be written, what the hub refuses.
    """
    kind = type(network.model).__name__
    if kind not in KINDS:
        raise UserError(f"only EfficientVMamba's networks are published in this format, not a {kind}")
    assert isinstance(network.model, EfficientVMamba | FeaturePyramid)
    arguments = network.model._hub_mixin_config
    assert isinstance(arguments, dict)
    config = arguments | {KIND_KEY: kind, CLASSES_KEY: network.class_names}
    card = card_of(target, kind, network.outputs, network.class_names, result, license)
    # The hub's mixin asks the network for its card.
    network.model.generate_model_card = lambda *args, **kwargs: card  # type: ignore[method-assign]
    try:
        if _is_folder(target):
            network.model.save_pretrained(target, config=config)
            return target
        return str(network.model.push_to_hub(target, config=config, private=private))
    except (HfHubHTTPError, HFValidationError) as error:
        raise UserError(f"the hub refuses {target}: {first_line(error)}") from error
    except OSError as error:
        raise UserError(f"cannot write to {target}: {error.strerror or first_line(error)}") from error


def pull(origin: str, output: Path, revision: str | None = None) -> str:
    """Fetch a network and write its weights as safetensors, with their description.

    Returns:
        What was written, in words.

    Raises:
        UserError: no such folder or repository, or not one of ours.
    """
    config = _read_config(origin, revision)
    kind = KINDS.get(str(config.get(KIND_KEY)))
    if kind is None:
        raise UserError(f"{origin} holds no network that `evmamba push` wrote (its config.json has no {KIND_KEY})")
    try:
        model = kind.from_pretrained(origin, revision=revision, strict=True)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
    except Exception as error:  # of a stranger's options and weights anything may come
        raise UserError(f"{origin}: its network cannot be built and filled ({first_line(error)})") from error
    save_checkpoint(model, output)
    names = config.get(CLASSES_KEY)
    classes = len(names) if isinstance(names, list) else 0
    return f"{output}: {kind.__name__}{f', {classes} classes' if classes else ''}"


def _read_config(origin: str, revision: str | None) -> dict[str, object]:
    if _is_folder(origin):
        path = Path(origin) / "config.json"
        for name in (path.name, WEIGHTS_FILE):
            if not is_file(Path(origin) / name):
                raise UserError(f"{origin} holds no file {name}: nothing was pushed there")
    else:
        path = fetch(Source(repository=origin, revision=revision or "main", file="config.json"))
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path} describes no network")
    return config


def _is_folder(place: str) -> bool:
    return place.startswith((".", "/", "~")) or Path(place).is_dir()
