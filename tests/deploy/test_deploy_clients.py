"""deploy/api.py through the libraries that people call such a server with; one server for all of them."""

import pytest
from huggingface_hub import InferenceClient
from pydantic import BaseModel
from test_deploy_api import CHAT, Server

SAID = CHAT[0]["content"]


@pytest.fixture(scope="module")
def server(tiny):
    with Server([tiny / "llama"]) as running:
        yield running


@pytest.fixture(scope="module")
def expected(server):
    """What the server says to SAID, greedily, in 8 tokens: as chat, and as the continuation of a text."""
    ask = {"model": "llama", "max_tokens": 8, "temperature": 0}
    chat = server.client.chat.completions.create(messages=CHAT, **ask).choices[0].message.content
    return chat, server.client.completions.create(prompt=SAID, **ask).choices[0].text


def test_langchain(server, expected):
    from langchain_openai import ChatOpenAI, OpenAI

    ask = {"base_url": f"{server.url}/v1", "api_key": "none", "model": "llama", "temperature": 0, "max_tokens": 8}
    chat = ChatOpenAI(**ask, max_retries=0)
    reply = chat.invoke(SAID)
    assert reply.content == expected[0] and reply.usage_metadata["output_tokens"] == 8
    assert "".join(chunk.content for chunk in chat.stream(SAID)) == expected[0]
    again = chat.invoke([("user", SAID), reply, ("user", "And?")])  # its own message sent back
    assert again.usage_metadata["input_tokens"] > reply.usage_metadata["input_tokens"]
    assert ChatOpenAI(**ask, use_responses_api=True).invoke(SAID).text == expected[0]
    assert OpenAI(**ask).invoke(SAID) == expected[1]

    class Answer(BaseModel):
        word: str

    for method, field in (("json_schema", "response_format"), ("function_calling", "tools")):
        with pytest.raises(Exception, match=f"422.*{field}"):
            chat.with_structured_output(Answer, method=method).invoke(SAID)


def test_the_clients_of_the_hub(server, expected):
    client = InferenceClient(base_url=f"{server.url}/v1", api_key="none")
    ask = {"model": "llama", "messages": CHAT, "temperature": 0, "max_tokens": 8}
    assert client.chat_completion(**ask).choices[0].message.content == expected[0]
    chunks = client.chat.completions.create(**ask, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected[0]
