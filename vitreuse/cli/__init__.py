"""One file per command of ``vitreuse``; see vitreuse.cli.console for what a command is."""
