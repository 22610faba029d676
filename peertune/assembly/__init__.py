"""From a recipe to a job: what it chooses by name, what is built of it, how it is evaluated."""
