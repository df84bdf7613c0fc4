"""What is compiled where it is used, for the very processor that it is used on."""
