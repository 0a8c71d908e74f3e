"""Labels are scored as the language model's own logits for the whole text say, beginnings they share once."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flamingo_ft import Predictor
from flamingo_ft.adapters.answering import end_token_ids
from flamingo_ft.data.encode import encode_answer
from flamingo_ft.data.sample import CHUNK
from flamingo_ft.errors import UserError
from flamingo_ft.inference import ranking
from flamingo_ft.inference.prompts import Prompt, make_prompt
from flamingo_ft.inference.ranking import score_answers, trie_levels
from flamingo_ft.model.language_model_inputs import name_cache
from tests.data.dialogues import IMAGE, user
from tests.model.tiny_language_models import make_tiny

from .conftest import make_flamingo

LABELS = ("Seven.", "Seven or two.", "Two.", "Two", "It is a seven.", "It is a two.")


@pytest.fixture(scope="module")
def predictor():
    return Predictor(*make_flamingo(), batch_size=2)


@pytest.fixture(scope="module")
def prompts(folders):
    _, images = folders
    return [
        make_prompt(images[:1], "Which digit is this?"),
        make_prompt(images, "Which digits are these?"),
        make_prompt(images[1:], "Which digit is this?"),
        make_prompt(None, "Say seven."),
        few_shot(images),
    ]


def few_shot(images):
    """Return a prompt of one demonstration, and one without an image before it."""
    texts = (["Which digit? Two."], [IMAGE, "Which digit? Seven."], [IMAGE, "Which digit?\n"])
    return Prompt([{**user(*text), "role": CHUNK} for text in texts], images)


def test_a_few_shot_prompt_is_written_as_chunks_of_a_document_are(predictor, folders):
    (ids,) = predictor.encode([few_shot(folders[1])])
    text = predictor.processor.tokenizer.decode(ids)
    assert text.removeprefix(predictor.processor.tokenizer.bos_token or "") == (
        "Which digit? Two.<|endofchunk|><image>Which digit? Seven.<|endofchunk|><image>Which digit?\n"
    )
    with pytest.raises(UserError, match="got 1 of 2 with role chunk; give all or none this role"):
        predictor.encode([Prompt([{**user("a"), "role": CHUNK}, user("b")], [])])


@torch.no_grad()
def expected(predictor, prompt, label, with_end):
    """Return the log-likelihood of a label, from one forward of prompt and label in float64."""
    model, end_tokens = predictor.model, end_token_ids(predictor.model, predictor.processor)
    (ids,) = predictor.encode([prompt])
    answer = encode_answer(predictor.processor, prompt.messages, label)
    end = next(place for place, token in enumerate(answer) if token in end_tokens)
    answer = answer[: end + with_end]
    logits = model(torch.tensor([ids + answer]), **predictor.media.of([prompt])).logits[0].double()
    scores = logits.log_softmax(-1)[len(ids) - 1 : -1]
    return sum(score[token].item() for score, token in zip(scores, answer, strict=True))


@pytest.mark.parametrize("with_end", [True, False])
@pytest.mark.parametrize("rows", [128, 4])
def test_scores_equal_the_logits_of_the_whole_text(predictor, prompts, with_end, rows, monkeypatch):
    monkeypatch.setattr(ranking, "MAX_ROWS", rows)
    predictor = copy.deepcopy(predictor)
    predictor.model.double()  # whose logits depend least on how the text is divided
    done = []
    scores = predictor.rank(prompts, LABELS, with_end=with_end, on_batch=done.append)
    for prompt, row in zip(prompts, scores, strict=True):
        whole = [expected(predictor, prompt, label, with_end) for label in LABELS]
        torch.testing.assert_close(row, torch.tensor(whole), rtol=0, atol=2e-5)
    assert sum(done) == len(prompts) and scores[0].argmax() == torch.tensor(whole).argmax()


def test_the_prompt_is_read_once_and_each_shared_beginning_too(predictor, prompts):
    counts = []
    hook = predictor.model.lang_encoder.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: counts.append(args[0].shape)
    )
    predictor.rank(prompts[:1], LABELS)
    hook.remove()
    answers = [encode_answer(predictor.processor, prompts[0].messages, label) for label in LABELS]
    beginnings = {tuple(answer[:n]) for answer in answers for n in range(1, len(answer))}
    assert counts[0] == (1, len(predictor.encode(prompts[:1])[0]))
    assert sum(rows * tokens for rows, tokens in counts[1:]) <= len(beginnings)


class TextModel:
    """A language model alone, called as a Flamingo is."""

    device = "cpu"

    def __init__(self, family):
        self.lang_encoder = make_tiny(family).eval()

    def __call__(self, **inputs):
        inputs = {name: value for name, value in inputs.items() if value is not None}
        return self.lang_encoder(**name_cache(self.lang_encoder, inputs))


@pytest.mark.parametrize("family", ["gpt2", "mamba", "falcon_mamba", "jamba", "recurrent_gemma", "rwkv"])
def test_labels_are_scored_right_whatever_the_language_model_keeps_of_the_past(family):
    prompts, answers = [[1, 30, 31, 32], [1, 40, 41, 42]], [[5, 6, 7, 8], [5, 6, 9], [10, 11, 12, 13], [20]]
    model = TextModel(family)
    scores = score_answers(model, prompts, {}, answers)
    for prompt, row in zip(prompts, scores, strict=True):
        for answer, score in zip(answers, row, strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
            expected = logits.log_softmax(-1)[len(prompt) - 1 : -1][range(len(answer)), answer].sum()
            torch.testing.assert_close(score, expected, rtol=0, atol=1e-4)


def test_a_score_equals_the_logits_of_the_whole_text_whatever_shares_its_batch(predictor, prompts):
    answers = [LABELS[(2 * number) % len(LABELS)] for number in range(len(prompts))]
    done = []
    scores = predictor.score(prompts, answers, batch_size=3, on_batch=done.append)
    for prompt, answer, score in zip(prompts, answers, scores, strict=True):
        whole = expected(predictor, prompt, answer, with_end=True)
        assert score.log_likelihood == pytest.approx(whole, abs=2e-5)
        (alone,) = predictor.score([prompt], [answer])
        assert alone.log_likelihood == pytest.approx(whole, abs=2e-5)
        assert (alone.tokens, alone.is_greedy) == (score.tokens, score.is_greedy)
    assert sum(done) == len(prompts)


def test_scores_and_ranks_of_the_same_answers_are_equal(predictor, prompts):
    ranks = predictor.rank(prompts[:1], LABELS, per_token=True)[0]
    scores = predictor.score(prompts[:1] * len(LABELS), LABELS)
    means = torch.tensor([score.log_likelihood / score.tokens for score in scores])
    torch.testing.assert_close(means, ranks, rtol=0, atol=1e-5)


def test_only_the_answer_of_greedy_decoding_is_greedy(predictor, prompts, monkeypatch):
    (ids,), prompt = predictor.encode(prompts[:1]), prompts[0]
    media = predictor.media.of([prompt])
    with torch.no_grad():
        tokens = predictor.model.generate(torch.tensor([ids]), **media, do_sample=False, max_new_tokens=6)
    greedy = tokens[0, len(ids) :].tolist()
    other = [*greedy[:-1], (greedy[-1] + 1) % predictor.model.config.get_text_config().vocab_size]
    for answer, is_greedy in ((greedy, True), (other, False)):
        monkeypatch.setattr(Predictor, "_answer_tokens", lambda *args, answer=answer: answer)
        (score,) = predictor.score([prompt], ["its text is not read"])
        assert (score.is_greedy, score.tokens) == (is_greedy, 6)


def test_an_answer_that_does_not_fit_into_the_context_is_refused(predictor):
    with pytest.raises(UserError, match=r"got \d+ text tokens and \d+ of the answer, .* context is 512"):
        predictor.score([make_prompt(None, "Count.")], ["seven " * 512])


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=6))
def test_every_path_of_a_trie_spells_the_sequence_that_ends_there(sequences):
    paths, spelled = [()], {}
    for level in trie_levels(sequences):
        nodes = [(*paths[parent], token) for parent, token in zip(level.parents, level.tokens, strict=True)]
        assert len(set(nodes)) == len(nodes)
        spelled |= {number: list(nodes[node]) for node, number in level.ends}
        for node, number in level.tails:
            assert tuple(sequences[number][: len(nodes[node])]) == nodes[node]
            spelled[number] = sequences[number]
        paths = [nodes[node] for node in level.inner]
    assert paths == [] and [spelled[number] for number in range(len(sequences))] == sequences


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((), "labels: got none; give at least one"),
        (("a", " "), "labels: got a blank one, ' '; write its text"),
        (("a", "b", "a"), "labels: got 'a' twice; remove one"),
    ],
)
def test_wrong_labels_are_refused(predictor, prompts, labels, message):
    with pytest.raises(UserError) as caught:
        predictor.rank(prompts, labels)
    assert str(caught.value) == message
