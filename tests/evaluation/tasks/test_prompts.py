"""Prompts are, character by character, those of OpenFlamingo's evaluation; answers are cut as there.

Source: github.com/mlfoundations/open_flamingo, open_flamingo/eval/models/open_flamingo.py and evaluate.py.
"""

import pytest

from flamingo_ft.data.sample import display_text
from flamingo_ft.evaluation.tasks import TASKS, chat_prompt, few_shot_prompt
from flamingo_ft.inference.predictor import Prompt
from flamingo_ft.model.added_tokens import EOC_TOKEN


def text_of(prompt: Prompt) -> str:
    assert {message["role"] for message in prompt.messages} == {"chunk"}
    return EOC_TOKEN.join(map(display_text, prompt.messages))


def prompt_of(name, published, shots, *, show_images=True, make=few_shot_prompt):
    """The prompt of a task's first row, after its first training rows."""
    task = TASKS[name]
    folder = task.open(published[name])
    demonstrations = task.train_examples(folder)[:shots] if shots else []
    example = task.eval_examples(folder)[0]
    prompt = make(task, example, demonstrations, show_images=show_images)
    shown = [*(demonstrations if show_images else []), example]
    assert prompt.images == [path for one in shown for path in one.images]
    assert prompt.where == example.where
    return prompt


TWO_SHOTS = {
    "coco": "<image>Output:A dog.<|endofchunk|>\n<image>Output:A red bus.<|endofchunk|>\n<image>Output:",
    "flickr30k": (
        "<image>Output:Men at work.<|endofchunk|>\n<image>Output:A girl climbs.<|endofchunk|>\n<image>Output:"
    ),
    "vqav2": (
        "<image>Question:Is it red? Short answer:yes<|endofchunk|>\n"
        "<image>Question:How many? Short answer:2<|endofchunk|>\n"
        "<image>Question:What is it? Short answer:"
    ),
    "ok_vqa": (
        "<image>Question:What breed? Short answer:pug<|endofchunk|>\n"
        "<image>Question:Who drives? Short answer:man<|endofchunk|>\n"
        "<image>Question:What sport is this? Short answer:"
    ),
    "textvqa": (
        "<image>Question:what number? Short answer:7<|endofchunk|>\n"
        "<image>Question:who? Short answer:nokia<|endofchunk|>\n"
        "<image>Question:what is the brand? Short answer:"
    ),
    "vizwiz": (
        "<image>Question:What color? Short answer:red<|endofchunk|>\n"
        "<image>Question:Is it on? Short answer:yes<|endofchunk|>\n"
        "<image>Question:What is this?  Short answer:"
    ),
    "hateful_memes": (
        "<image>is an image with: 'its their character' written on it. Is it hateful? Answer:no<|endofchunk|>"
        "<image>is an image with: 'don't be afraid' written on it. Is it hateful? Answer:yes<|endofchunk|>"
        "<image>is an image with: 'white people is this a shooting range' written on it. "
        "Is it hateful? Answer:"
    ),
    "imagenet": "<image>Output:tench<|endofchunk|><image>Output:goldfish<|endofchunk|><image>Output:",
}


@pytest.mark.parametrize("name", TWO_SHOTS)
def test_two_shots_are_written_as_open_flamingo_writes_them(name, published):
    assert text_of(prompt_of(name, published, 2)) == TWO_SHOTS[name]


@pytest.mark.parametrize("name", TWO_SHOTS)
def test_zero_shots_are_two_demonstrations_without_their_images(name, published):
    two_shots = text_of(prompt_of(name, published, 2))
    *demonstrations, question = two_shots.split("<image>")
    expected = "".join(demonstrations) + "<image>" + question
    assert text_of(prompt_of(name, published, 2, show_images=False)) == expected


@pytest.mark.parametrize("name", TASKS)
def test_without_demonstrations_the_prompt_is_the_image_and_the_question(name, published):
    text = text_of(prompt_of(name, published, 0))
    assert text.startswith("<image>") and EOC_TOKEN not in text and not text.startswith("<image>\n")


def test_a_problem_of_text_alone_has_no_image(published):
    task = TASKS["scienceqa"]
    folder = task.open(published["scienceqa"])
    prompt = few_shot_prompt(task, task.eval_examples(folder)[1], task.train_examples(folder))
    assert text_of(prompt) == (
        "<image>Question: Which is a solid?\nContext: Look.\nOptions: (A) ice (B) air\nAnswer:A"
        "<|endofchunk|>\n"
        "Question: Which is wet?\nContext: N/A\nOptions: (A) sand (B) sea\nAnswer:B"
        "<|endofchunk|>\n"
        "Question: Which rhymes?\nContext: Read them.\nOptions: (A) cat (B) dog (C) hat\nAnswer:"
    )
    assert len(prompt.images) == 1


def test_braces_in_a_question_stay(published):
    task = TASKS["vqav2"]
    example = task.eval_examples(task.open(published["vqav2"]))[0]
    odd = type(example)(example.where, example.images, "What is {0} {x}?", example.references)
    assert text_of(few_shot_prompt(task, odd)) == "<image>Question:What is {0} {x}? Short answer:"
    assert display_text(chat_prompt(task, odd).messages[0]).startswith("<image>What is {0} {x}?\n")


def test_a_chat_model_is_asked_after_demonstrations_as_turns(published):
    prompt = prompt_of("vqav2", published, 2, make=chat_prompt)
    request = "Answer the question using a single word or phrase."
    assert [(message["role"], display_text(message)) for message in prompt.messages] == [
        ("user", f"<image>Is it red?\n{request}"),
        ("assistant", "yes"),
        ("user", f"<image>How many?\n{request}"),
        ("assistant", "2"),
        ("user", f"<image>What is it?\n{request}"),
    ]
    prompt = prompt_of("vqav2", published, 1, show_images=False, make=chat_prompt)
    assert [display_text(message) for message in prompt.messages] == [
        f"Is it red?\n{request}",
        "yes",
        f"<image>What is it?\n{request}",
    ]


@pytest.mark.parametrize(
    "name, text, answer",
    [
        ("coco", ' A "red" bus\nOutput: A dog Output:', "A red bus"),
        ("coco", "A bus, a car", "A bus, a car"),
        ("vqav2", " two, or three", "two"),
        ("vqav2", "1,000 people", "1,000 people"),
        ("vqav2", "cat\nQuestion:What?", "cat"),
        ("vqav2", "cat Short answer:dog", "cat"),
        ("vqav2", "Answer", ""),
        ("gqa", "left Question: Is it, ", "left"),
        ("pope", "Yes, there is.", "yes"),
        ("pope", "There is a dog", "yes"),
        ("pope", "There is not a dog.", "no"),
        ("pope", "No, there is a cat", "no"),
        ("pope", "A dog. No cat.", "yes"),
        ("pope", "Nothing", "yes"),
        ("mme", "Yes, it is.", "yes"),
        ("mme", "NO", "no"),
        ("mme", "It is. Yes", "other"),
        ("mme", " No.", "no"),
    ],
)
def test_an_answer_is_cut_where_the_publisher_cuts_it(name, text, answer):
    assert TASKS[name].cut(text) == answer


def test_decoding_is_that_of_open_flamingo():
    lengths = {"coco": 20, "flickr30k": 20, "vqav2": 5, "ok_vqa": 5, "vizwiz": 5, "textvqa": 10}
    for name, length in lengths.items():
        expected = {"num_beams": 3, "length_penalty": 0.0, "max_new_tokens": length}
        assert TASKS[name].decoding == expected
