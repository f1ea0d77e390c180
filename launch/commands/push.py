"""`evmamba push`."""

from collections.abc import Sequence
from pathlib import Path

from evmamba.launch.commands.parser import Parser
from evmamba.launch.commands.shared import need_extra


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="evmamba push",
        description="Publish a network in the Hugging Face hub's format: in a folder, or in a repository of the hub "
        "(log in with `hf auth login` before).",
    )
    parser.add_argument("source", metavar="CHECKPOINT_OR_NAME", help="best.ckpt, or a backbone's name with --weights")
    parser.add_argument("target", metavar="FOLDER_OR_REPOSITORY", help="./folder, /folder, or user/repository")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="weights for a backbone given by its name")
    parser.add_argument("--backbone", action="store_true", help="the feature pyramid alone")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument(
        "--result", type=Path, metavar="FILE", help="result.json for the model card (default: the run's own, beside it)"
    )
    parser.add_argument("--license", help="of the weights, the hub's identifier (default: apache-2.0)")
    given = parser.parse_args(arguments)
    need_extra()

    from evmamba.launch.use.hub import push
    from evmamba.launch.use.model_card import LICENSE, read_card_result, result_of
    from evmamba.launch.use.networks import find_network

    network = find_network(given.source, given.weights, given.backbone)
    result = read_card_result(given.result) if given.result else result_of(Path(given.source))
    print(push(network, given.target, given.private, result, given.license or LICENSE))
    return 0
