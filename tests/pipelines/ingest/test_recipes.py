"""The graph accepts every shipped pipeline file once its data exists; and the recipes' own code does what it should."""

import importlib.util
import json
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from pipelines.artifacts import Conversations
from pipelines.ingest.dialogue_settings import DialogueConfig
from pipelines.ingest.dialogues import to_conversation, to_rating
from pipelines.plan import config, graph

from .conftest import FakeStage

CONFIGS = Path(__file__).parents[3] / "configs"
RECIPES = sorted(CONFIGS.glob("*.toml"))

MODEL = ["tokenizer", "tokenize", "pretrain"]
OTHER_STAGES = {
    "coffee": ["dialogues", "ratings", "prompts", "spoken", "sft", "reward_model", "rl"],
    "instruct-zh-en": ["instructions", "identity", "identity_questions", "pairs", "spoken", "sft", "reward_model"],
    "arithmetic": ["problems", "prompts", "sft", "rl"],
}
"""Stages besides those that every recipe has."""


@pytest.fixture
def built(data):
    def build(path: Path) -> graph.Graph:
        for stage in tomllib.loads(path.read_text(encoding="utf-8"))["stages"].values():
            for source in [stage, *stage.get("mixture", ())]:
                for pattern in source.get("files", ()):
                    file = data / pattern.replace("*", "any")
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.touch()
        return graph.build(config.load(path, [f'data="{data}"']))

    return build


@pytest.fixture
def code(monkeypatch):
    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_every_stage_from_documents_to_export(built, path):
    stages = list(built(path).stages)
    expected = ["documents", *MODEL, *OTHER_STAGES.get(path.stem, ()), "evaluate", "export"]
    if path.stem.startswith("quickstart"):
        assert stages[0] == "documents"
        assert set(expected) <= set(stages)
    else:
        assert sorted(stages) == sorted(expected)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_named_after_its_file_and_listed_in_the_readme(path):
    assert config.load(path).file.pipeline == path.stem
    assert f"`{path.name}`" in (CONFIGS / "README.md").read_text(encoding="utf-8")


def test_shakespeare_has_nanogpts_cpu_settings(built):
    pretrain = built(CONFIGS / "shakespeare.toml").stages["pretrain"].config
    shape = pretrain.shape()
    assert (shape.n_layer, shape.n_head, shape.n_embd, shape.seq_len, shape.dropout, shape.bias) == (4, 4, 128, 64, 0.0, False)
    assert (pretrain.global_batch_size, pretrain.steps, pretrain.lr, pretrain.warmup_steps, pretrain.beta2) == (12, 2000, 1e-3, 100, 0.99)


@pytest.mark.parametrize(
    ("recipe", "stages"),
    [
        ("coffee", ("dialogues", "ratings", "prompts")),
        ("instruct-zh-en", ("identity", "identity_questions")),
        ("arithmetic", ("problems", "prompts")),
    ],
)
def test_stages_that_share_questions_hold_out_the_same_ones(built, recipe, stages):
    held_out = {str(built(CONFIGS / f"{recipe}.toml").stages[stage].config.hold_out) for stage in stages}
    assert len(held_out) == 1
    assert "by='prompt'" in held_out.pop()


def test_the_assistants_name_is_the_same_in_training_and_evaluation(built):
    stages = built(CONFIGS / "instruct-zh-en.toml").stages
    learned, asked = stages["identity"].config, stages["identity_questions"].config
    assert (learned.name, learned.author) == (asked.name, asked.author)


# ---- coffee ----

ORDER = {
    "utterances": [
        {
            "speaker": "user",
            "text": "One latte, please",
            "annotations": [
                {"name": "api_call", "value": "get_menu_items", "context": "api_call_0"},
                {"name": "request", "value": '{"query": "latte"}', "context": "api_call_0"},
                {"name": "api_response", "value": "get_menu_items", "context": "api_response_0"},
                {
                    "name": "response",
                    "value": '{"menu_items":[{"menu_item_id":"latte-1928","name":"Latte\t"}]}',
                    "context": "api_response_0",
                },
                {"name": "api_call", "value": "show_order_screen", "context": "api_call_1"},
                {"name": "api_response", "value": "show_order_screen", "context": "api_response_1"},
                {"name": "response", "value": '{"success":true}', "context": "api_response_1"},
            ],
        },
        {"speaker": "assistant", "text": "Is that right?", "annotations": []},
    ]
}
API = DialogueConfig(source="json", files=("a.json",), roles={"api": "user"})


def test_a_coffee_dialogue_has_its_calls_in_order(code):
    messages = to_conversation({"messages": code("coffee").dialogue(ORDER)}, API)["messages"]
    assert [(message["role"], message["content"]) for message in messages] == [
        ("user", "One latte, please"),
        ("assistant", "[get_menu_items query: latte]"),
        ("user", "[items: [menu_item_id: latte-1928, name: Latte]]"),
        ("assistant", "[show_order_screen]"),
        ("user", "[success: true]"),
        ("assistant", "Is that right?"),
    ]


def turns(*of_context: dict, generation: dict) -> dict:
    return {"context": json.dumps(of_context), "generation": json.dumps(generation), "reward": 1.0}


def test_a_rated_turn_follows_the_dialogue_without_the_welcome(code):
    columns = turns(
        {"role": "agent", "text": "Welcome to the Coffee Bar"},
        {"role": "user", "text": "an espresso, and a mocha with oat milk"},
        {"role": "agent", "api": {"": {}}},
        {"role": "api", "response": {"invalid_intent": {}}},
        generation={
            "role": "agent",
            "api": {
                "add_order_item": {
                    "menu_item_id": "mocha-0006",
                    "quantity": "1",
                    "attributes": [{"attribute_id": "milk-options", "attribute_name": "Milk", "option": "Oat Milk"}],
                }
            },
        },
    )
    messages, response = code("coffee").before_and_next(columns)
    assert [message["content"] for message in messages] == ["an espresso, and a mocha with oat milk", "[]", "[invalid_intent]"]
    assert response == "[add_order_item menu_item_id: mocha-0006, quantity: 1, attributes: [milk-options: Oat Milk]]"
    rating = to_rating({"messages": messages, "response": response, "score": 1.0}, API, (0, 1))
    assert [message["role"] for message in rating["prompt"]] == ["user", "assistant", "user"]


def test_orders_are_numbered_by_first_mention_so_a_wrong_order_stays_distinct(code):
    columns = turns(
        {"role": "user", "text": "an espresso"},
        {"role": "agent", "api": {"add_order_item": {"menu_item_id": "espresso-0001"}}},
        {"role": "api", "response": {"add_order_item": {"order_id": "9caad543", "order_item_id": "46428222"}}},
        {"role": "user", "text": "and that's it"},
        generation={"role": "agent", "api": {"finish_order": {"order_id": "ffffffff"}}},
    )
    messages, response = code("coffee").before_and_next(columns)
    assert messages[2]["content"] == "[order_id: order-1, order_item_id: item-1]"
    assert response == "[finish_order order_id: order-2]"
    columns["generation"] = columns["generation"].replace("ffffffff", "9caad543")
    assert code("coffee").before_and_next(columns)[1] == "[finish_order order_id: order-1]"


def test_a_rating_without_a_customers_message_is_a_bad_record(code):
    messages, response = code("coffee").before_and_next(turns(generation={"role": "agent", "text": "Sorry, no."}))
    assert (messages, response) == ([], "Sorry, no.")
    with pytest.raises(ValueError, match=r"messages is \[\], expected a list of messages"):
        to_rating({"messages": messages, "response": response, "score": 1.0}, API, (0, 1))


# ---- instruct-zh-en ----


def test_the_assistants_name_is_filled_into_texts_only(code):
    identity = code("identity").IdentityConfig(source="json", files=("a.json",), format="alpaca", name="Mei", author="gptline")
    columns = {"instruction": "你是谁？", "input": "", "output": "我是 {{name}}，由 {{author}} 开发。", "id": 3}
    assert identity.filled(columns) == {"instruction": "你是谁？", "input": "", "output": "我是 Mei，由 gptline 开发。", "id": 3}


def test_a_conversation_becomes_a_document_on_the_same_side_of_the_hold_out(code, tmp_path):
    spoken, folder, output = code("spoken"), tmp_path / "conversations", tmp_path / "output"
    folder.mkdir()
    output.mkdir()
    for split, question in (("train", "Hi"), ("held_out", "你好")):
        record = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "Hello."}]}
        (folder / f"{split}.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    conversations = Conversations(folder, "0" * 64, {"licenses": {"MIT": {"conversations": 2}}})
    documents = spoken.documents(None, [conversations], FakeStage(output, []))
    assert list(documents.texts("train")) == ["Hi\nHello."]
    assert list(documents.texts("held_out")) == ["你好\nHello."]
    assert documents.metadata["held_out"] == {"documents": 1, "bytes": len("你好\nHello.".encode())}
    assert documents.metadata["licenses"] == ["MIT"]


# ---- arithmetic ----


@pytest.mark.parametrize(
    ("equation", "answer", "working"),
    [
        ("( 76.0 - 25.0 )", 51.0, "76 - 25 = 51\n#### 51"),
        ("( 20.0 - ( 5.0 + 2.0 ) )", 13.0, "20 - (5 + 2) = 13\n#### 13"),
        ("( ( 3.0 + 2.0 ) * 10.0 )", 50.0, "(3 + 2) * 10 = 50\n#### 50"),
        ("( 4700.0 * 4700.0 )", 22090000.0, "4700 * 4700 = 22090000\n#### 22090000"),
        ("( ( 1.0 / 3.0 ) * 3.0 )", 1.0, "1 / 3 * 3 = 1\n#### 1"),
    ],
)
def test_the_equation_becomes_the_working_and_its_value_the_answer(code, equation, answer, working):
    assert code("arithmetic").working({"Equation": equation, "Answer": answer}) == working


@pytest.mark.parametrize(
    ("equation", "reason"),
    [
        ("( ( 4.0 - 2.0 ) + 3.0 )", "is 5, the answer 1.0"),
        ("( 4.0 / 0.0 )", "can't be computed"),
        ("( 4.0 ** 9.0 )", "can't be computed"),
        ("quit()", "can't be computed"),
        ("( 4.0 -", "can't be computed"),
    ],
)
def test_an_equation_whose_value_is_not_the_answer_is_a_bad_record(code, equation, reason):
    with pytest.raises(ValueError, match=reason):
        code("arithmetic").working({"Equation": equation, "Answer": 1.0})


def test_a_body_and_its_question_are_two_sentences(code):
    problem = code("arithmetic").problem
    assert problem({"Body": "Dan had $ 3 left", "Question": "How much did he spend?"}) == "Dan had $ 3 left. How much did he spend?"
    assert problem({"Body": "Dan had $ 3 left. ", "Question": "How much?"}) == "Dan had $ 3 left. How much?"
