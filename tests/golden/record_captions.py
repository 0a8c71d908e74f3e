"""Record what pycocoevalcap 1.2 computes on generated captions: CIDEr, BLEU and ROUGE-L, of the same tokens.

pip install --no-deps pycocoevalcap==1.2
python -m tests.golden.record_captions        # from the root; writes caption_scores.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.golden.caption_cases import Captions, caption_cases

FILE = Path(__file__).parent / "caption_scores.json"


def official_scores(captions: Captions) -> dict[str, Any]:
    """Return corpus scores and the scores of each prediction, computed by pycocoevalcap."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    predictions, references = captions
    expected, given = dict(enumerate(references)), {i: [text] for i, text in enumerate(predictions)}
    bleu, each_bleu = Bleu(4).compute_score(expected, given, verbose=0)
    cider, each_cider = Cider().compute_score(expected, given)
    rouge, each_rouge = Rouge().compute_score(expected, given)
    corpus = {f"bleu_{n}": value for n, value in enumerate(bleu, start=1)}
    return {
        "corpus": corpus | {"cider_d": float(cider), "rouge_l": float(rouge)},
        "each": {"bleu_4": each_bleu[3], "cider_d": each_cider.tolist(), "rouge_l": each_rouge.tolist()},
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(official_scores(caption_cases())) + "\n", encoding="utf-8")
