"""One file per command of ``vitreuse``; see vitreuse.console for what a command is."""
