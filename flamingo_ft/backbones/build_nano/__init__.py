"""How the nano backbones and the quickstart data were made; nothing here runs when a model is used."""
