"""Subcommands of `loraxs` that are more than a few lines; `loraxs_ext.cli` lists all of them."""
