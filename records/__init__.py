"""Records, and the tools that judge them. A package, or another `records` could stand before it."""
