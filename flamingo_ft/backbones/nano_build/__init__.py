"""How the nano backbones and the quickstart data are made; nothing here runs when a model is used."""
