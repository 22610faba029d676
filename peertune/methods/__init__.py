"""The methods: which factors train and travel in a round, and how heard factors combine."""
