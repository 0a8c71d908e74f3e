"""Reading all of a recipe's data before it is trained on: what is in it, and what is wrong with it."""
