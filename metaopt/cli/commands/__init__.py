"""The commands; see `metaopt.cli.app` for how one is added."""
