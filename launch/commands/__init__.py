"""The subcommands of `evmamba`: one file each, with ``main(arguments) -> exit status``. Their logic lives elsewhere."""
