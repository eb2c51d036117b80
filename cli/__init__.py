"""The commands `actstore` and `trainer`: arguments and printing, no logic. Nothing imports this package."""
