"""Conversations: which tokens are trained on, checked against literal text and transformers."""

import pytest
from transformers import AutoTokenizer

from autotune.errors import AutotuneError
from autotune.runner.data.templates import END_OF_TURN, shipped_template
from autotune.spec.training import DatasetSource
from tests.integration.documents import CHAT, load, read, runs, trained_text

pytestmark = pytest.mark.integration

QUESTION = {"role": "user", "content": "Tell me."}


def chat(tokenizer, path, **keys):
    """Return the one document of a file of conversations."""
    (document,) = load(tokenizer, path, "chat_template", **keys)
    return document


def test_every_token_has_the_label_written_down_here(tokenizer, write):
    talk = [QUESTION, {"role": "assistant", "content": "Wide sea"}]
    document = chat(tokenizer, write("a.jsonl", [{"messages": talk}]))
    pieces = [
        ("<|im_start|>", False), ("user\nTell me.", False), ("<|im_end|>", False), ("\n", False),
        ("<|im_start|>", False), ("assistant\n", False), ("Wide sea", True), ("<|im_end|>", True),
        ("\n", False),
    ]  # fmt: skip
    expected = [
        (token, token if trained else -100)
        for text, trained in pieces
        for token in tokenizer(text)["input_ids"]
    ]
    assert list(zip(document.input_ids, document.labels, strict=True)) == expected


def test_chat_trains_on_each_answer_and_its_end_of_turn(tokenizer, write):
    (document,) = load(tokenizer, write("a.jsonl", [{"messages": CHAT}]), "chat_template")
    assert runs(document, tokenizer) == [
        (
            False,
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nTell me a story.<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (True, "The sea is wide.<|im_end|>"),
        (False, "\n<|im_start|>user\nThe sea is wide.<|im_end|>\n<|im_start|>assistant\n"),
        (True, "Tell me.<|im_end|>"),
        (False, "\n"),
    ]
    whole = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert document.input_ids.tolist() == whole


TEMPLATES = {
    # As Qwen3: an earlier answer loses its reasoning, the last one has a block for it.
    "drops earlier reasoning": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}"
        "<think>\n{{ m.content.split('</think>')[0] if '</think>' in m.content else '' }}\n"
        "</think>\n{{ m.content.split('</think>')[-1] }}"
        "{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}<|im_end|>\n{% endfor %}",
        ["The sea is wide.<|im_end|>", "Tell me.<|im_end|>"],
    ),
    "a space before the stop, as Llama 2": (
        "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}"
        "{{ ' <|endoftext|>' if m.role == 'assistant' else '' }}{% endfor %}",
        ["The sea is wide. <|endoftext|>", "Tell me. <|endoftext|>"],
    ),
    "no stop at all": (
        "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n{% endfor %}",
        ["The sea is wide.", "Tell me.", "<|endoftext|>"],
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_finds_the_answers_in_any_template(tokenizer, write, name):
    tokenizer.chat_template, expected = TEMPLATES[name]
    (document,) = load(tokenizer, write("a.jsonl", [{"messages": CHAT}]), "chat_template")
    assert trained_text(document, tokenizer) == expected


def test_chat_trains_on_the_reasoning_a_template_writes(tokenizer, write):
    tokenizer.chat_template = TEMPLATES["drops earlier reasoning"][0]
    talk = [CHAT[1], {"role": "assistant", "content": "It is long.</think>Tell me."}]
    (document,) = load(tokenizer, write("a.jsonl", [{"messages": talk}]), "chat_template")
    assert trained_text(document, tokenizer) == ["It is long.\n</think>\nTell me.<|im_end|>"]


def test_an_empty_answer_trains_on_the_end_of_turn(tokenizer, write):
    talk = [CHAT[1], {"role": "assistant", "content": ""}]
    (document,) = load(tokenizer, write("a.jsonl", [{"messages": talk}]), "chat_template")
    assert trained_text(document, tokenizer) == ["<|im_end|>"]


def test_no_end_of_sequence_behind_a_user_s_message(tokenizer, write):
    tokenizer.chat_template = TEMPLATES["no stop at all"][0]
    (document,) = load(tokenizer, write("a.jsonl", [{"messages": CHAT[:4]}]), "chat_template")
    assert trained_text(document, tokenizer) == ["The sea is wide."]


WITH_GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    "answer",
    ["Wide.", " wide ", "\n\nThe  sea \n", "<|im_end|>", "user", "assistant\n", "ünd 海 😀"],
)
def test_the_mask_is_the_one_transformers_makes(tokenizer, write, answer):
    """The template marks its answers itself, in a way only transformers reads."""
    talk = [QUESTION, {"role": "assistant", "content": answer}]
    talk += [{"role": "user", "content": answer}, talk[1]]
    tokenizer.chat_template = WITH_GENERATION
    theirs = tokenizer.apply_chat_template(
        talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    document = chat(tokenizer, write("a.jsonl", [{"messages": talk}]))
    assert document.input_ids.tolist() == theirs["input_ids"]
    assert document.trained.tolist() == [bool(one) for one in theirs["assistant_masks"]]


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("answer", ["The sea  \n\n   wide", "   ", "  The", "The   "])
def test_tokens_of_spaces_are_trained_on_like_others(tokenizer, write, answer, trim):
    """GPT-2's offsets leave spaces out, so that a token of spaces has no width."""
    from tokenizers.processors import ByteLevel

    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=trim)
    talk = [QUESTION, {"role": "assistant", "content": answer}]
    for train_on_eos, end in (("turn", "<|im_end|>"), ("none", "")):
        document = chat(
            tokenizer, write("a.jsonl", [{"messages": talk}]), train_on_eos=train_on_eos
        )
        assert "".join(trained_text(document, tokenizer)) == f"{answer}{end}"


KEYS = {
    "roles to train": (
        {"roles_to_train": ["user", "gpt"]},
        ["Tell me a story.<|im_end|>", "The sea is wide.<|im_end|>"] * 2,
    ),
    "no role but the first": ({"roles_to_train": ["system"]}, ["Be kind.<|im_end|>"]),
    "every end of turn": (
        {"train_on_eos": "all"},
        [
            "<|im_end|>", "<|im_end|>", "The sea is wide.<|im_end|>", "<|im_end|>",
            "Tell me.<|im_end|>",
        ],
    ),
    "the last end of turn": (
        {"train_on_eos": "last"}, ["The sea is wide.", "Tell me.<|im_end|>"],
    ),
    "the last end that is trained": (
        {"train_on_eos": "last", "roles_to_train": ["system"]}, ["Be kind.<|im_end|>"],
    ),
    "no end of turn": ({"train_on_eos": "none"}, ["The sea is wide.", "Tell me."]),
    "said by the message": (
        {"message_field_training": "train"}, ["Be kind.<|im_end|>", "Tell me.<|im_end|>"],
    ),
}  # fmt: skip
KEYS["roles to train"][1][2:] = ["The sea is wide.<|im_end|>", "Tell me.<|im_end|>"]


@pytest.mark.parametrize("name", KEYS)
def test_what_is_trained_on_follows_the_keys(tokenizer, write, name):
    keys, expected = KEYS[name]
    talk = [{**m, "train": None} for m in CHAT]
    talk[0]["train"], talk[2]["train"] = True, False
    document = chat(tokenizer, write("a.jsonl", [{"messages": talk}]), **keys)
    assert trained_text(document, tokenizer) == expected


def test_train_on_inputs_trains_on_every_message(tokenizer, write):
    path = write("a.jsonl", [{"messages": CHAT}])
    source = DatasetSource(path=path, type="chat_template")
    (document,), _ = read(tokenizer, source, train_on_inputs=True)
    assert trained_text(document, tokenizer) == [f"{m['content']}<|im_end|>" for m in CHAT]


def test_names_of_the_data_are_mapped(tokenizer, write):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    talk = [{"from": names[m["role"]], "value": m["content"], "extra": None} for m in CHAT]
    path = write("a.jsonl", [{"conversations": talk}])
    keys = {
        "field_messages": "conversations",
        "message_property_mappings": {"role": "from", "content": "value"},
    }
    plain = chat(tokenizer, write("b.jsonl", [{"messages": CHAT}]))
    assert (chat(tokenizer, path, **keys).labels == plain.labels).all()
    bot = write("c.jsonl", [{"messages": [QUESTION, {"role": "bot", "content": "Wide."}]}])
    document = chat(tokenizer, bot, roles={"assistant": ["bot"]})
    assert trained_text(document, tokenizer) == ["Wide.<|im_end|>"]


def test_a_system_message_beside_the_others_and_one_to_drop(tokenizer, write):
    beside = chat(tokenizer, write("a.jsonl", [{"system": "Be kind.", "messages": CHAT[1:]}]))
    within_row = write("b.jsonl", [{"messages": CHAT}])
    within = chat(tokenizer, within_row)
    assert (beside.labels == within.labels).all()
    dropped = chat(tokenizer, within_row, drop_system_message=True)
    assert "Be kind." not in tokenizer.decode(dropped.input_ids)
    assert trained_text(dropped, tokenizer) == trained_text(within, tokenizer)


TOOLS = (
    "{% if tools %}<tools>{{ tools[0].name }}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content is defined %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}"
    "<call>{{ call.function.arguments.city }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)


def test_reasoning_and_tool_calls_are_part_of_the_answer(tokenizer, write):
    tokenizer.chat_template = TOOLS
    call = {"function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
    talk = [
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "Wide."},
        {"role": "assistant", "content": "The sea.", "reasoning_content": "Tell me"},
    ]
    tools = '[{"name": "weather"}]'
    document = chat(tokenizer, write("a.jsonl", [{"messages": talk, "tools": tools}]))
    assert tokenizer.decode(document.input_ids).startswith("<tools>weather</tools>")
    assert trained_text(document, tokenizer) == [
        "<call>Ulm</call><|im_end|>",
        "<think>Tell me</think>The sea.<|im_end|>",
    ]


SHIPPED = {
    "chatml": ("<|im_start|>user\nTell me.<|im_end|>\n<|im_start|>assistant\n", "\n"),
    "llama3": (
        "<|start_header_id|>user<|end_header_id|>\n\nTell me.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "",
    ),
    "gemma": ("<start_of_turn>user\nTell me.<end_of_turn>\n<start_of_turn>model\n", "\n"),
    "phi_3": ("<|user|>\nTell me.<|end|>\n<|assistant|>\n", "\n"),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_templates(tokenizer, write, name):
    """Also where the tokenizer has no token for the end of a turn, as here for most."""
    tokenizer.chat_template = None
    prompt, rest = SHIPPED[name]
    talk = [QUESTION, {"role": "assistant", "content": "Wide."}]
    document = chat(tokenizer, write("a.jsonl", [{"messages": talk}]), chat_template=name)
    expected = [(False, prompt), (True, f"Wide.{END_OF_TURN[name]}"), (False, rest)]
    assert runs(document, tokenizer) == [run for run in expected if run[1]]
    asked = tokenizer.apply_chat_template(
        talk[:1], chat_template=shipped_template(name), add_generation_prompt=True, tokenize=False
    )
    assert asked == prompt, "as at inference"


def test_a_template_s_bos_comes_once(tokenizer, write):
    tokenizer.bos_token = "<|im_start|>"
    talk = [QUESTION, {"role": "assistant", "content": "Wide."}]
    document = chat(tokenizer, write("a.jsonl", [{"messages": talk}]), chat_template="llama3")
    assert (document.input_ids == tokenizer.bos_token_id).sum() == 1


def test_which_template(tokenizer, write, trained_tokenizer):
    path = write("a.jsonl", [{"messages": [QUESTION, {"role": "assistant", "content": "Wide."}]}])
    own = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    tokenizer.chat_template = None
    with pytest.raises(
        AutotuneError, match=r"no chat template. Set chat_template to one of chatml"
    ):
        chat(tokenizer, path)
    with pytest.raises(AutotuneError, match=r"'chatm' is not known.*Nearest: chatml"):
        chat(tokenizer, path, chat_template="chatm")
    with pytest.raises(AutotuneError, match="needs chat_template_jinja"):
        chat(tokenizer, path, chat_template="jinja")
    fallback = chat(tokenizer, path, chat_template="tokenizer_default_fallback_chatml")
    named = chat(tokenizer, path, chat_template="chatml")
    assert (fallback.labels == named.labels).all()
    tokenizer.chat_template = {"rag": own, "tools": own}
    with pytest.raises(AutotuneError, match="several chat templates and no default"):
        chat(tokenizer, path)
    tokenizer.chat_template = own
    with_own = chat(tokenizer, path, chat_template="tokenizer_default_fallback_chatml")
    assert tokenizer.decode(with_own.input_ids).startswith("[Tell me.][Wide.]")
    jinja = chat(AutoTokenizer.from_pretrained(trained_tokenizer), path, chat_template_jinja=own)
    assert (jinja.labels == with_own.labels).all()


REFUSED = {
    "an answer written twice": (
        "{% for m in messages %}{{ m.content }}|{{ m.content }}\n{% endfor %}",
        r"message 3 \(assistant\) 2 times",
    ),
    "an answer left out": (
        "{% for m in messages %}{{ m.content if m.role == 'user' }}\n{% endfor %}",
        r"message 3 \(assistant\) 0 times",
    ),
    "questions behind their answers": (
        "{{ messages[0].content }}{{ messages[2].content }}\n{{ messages[1].content }}"
        "{{ messages[4].content }}\n{{ messages[3].content }}",
        "mixes message",
    ),
    "a question that follows from the answer": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }} "
        "({{ messages[loop.index0 + 1].content | length }}) {% else %}{{ m.content }} {% endif %}"
        "{% endfor %}",
        "in another place",
    ),
    "no template": ("{% for m in messages %}", "refuses"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_where_messages_cannot_be_told_apart_the_data_is_refused(tokenizer, write, name):
    tokenizer.chat_template, message = REFUSED[name]
    with pytest.raises(AutotuneError, match=f"a.jsonl:1.*{message}"):
        chat(tokenizer, write("a.jsonl", [{"messages": CHAT}]))


def test_the_start_of_the_next_turn_is_no_end_of_this_one(tokenizer, write):
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    )
    document = chat(tokenizer, write("a.jsonl", [{"messages": CHAT}]))
    assert trained_text(document, tokenizer) == ["The sea is wide.", "Tell me.<|endoftext|>"]
    document = chat(tokenizer, write("a.jsonl", [{"messages": CHAT}]), train_on_eos="none")
    assert trained_text(document, tokenizer) == ["The sea is wide.", "Tell me."]


BAD = [
    ({"role": "human?", "content": "x"}, r"role 'human\?'; allowed: system, user, assistant, tool"),
    ({"from": "human", "value": "x"}, "needs the keys role, content; found: from, value"),
    ({"role": "user", "content": [{"type": "text"}]}, "content of type list, not text"),
    ({"role": "user", "content": None}, "needs the keys role, content; found: role"),
    ({"role": "user", "content": "a\U0010fffeb"}, r"U\+10FFFE"),
    ({"role": "user", "content": "a", "tool_calls": "x"}, "tool_calls is not a list"),
    ("text", "is a str, not an object"),
]


@pytest.mark.parametrize(("message", "said"), BAD)
def test_bad_messages(tokenizer, write, message, said):
    with pytest.raises(AutotuneError, match=f"a.jsonl:1.*{said}"):
        chat(tokenizer, write("a.jsonl", [{"messages": [message]}]))


def test_conversations_in_a_string_of_json(tokenizer, write):
    import json

    document = chat(tokenizer, write("a.jsonl", [{"messages": json.dumps(CHAT)}]))
    assert trained_text(document, tokenizer) == ["The sea is wide.<|im_end|>", "Tell me.<|im_end|>"]
    with pytest.raises(AutotuneError, match="text that is not JSON"):
        chat(tokenizer, write("b.jsonl", [{"messages": "hello"}]))
