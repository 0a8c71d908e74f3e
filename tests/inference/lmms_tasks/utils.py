"""The functions that the two tasks beside this file name; lmms-eval imports them from here."""

from PIL import Image


def doc_to_visual(doc):
    return [Image.open(path) for path in doc["images"]]


def doc_to_choice(doc):
    return doc["choices"]


def process_results(doc, results):
    return {"right": float(results[0] == doc["answer"])}
