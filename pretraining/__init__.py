"""How the embedded base model was made: its text, its training, and the recipe that is kept with it."""
