"""Request bodies as clients send them, written down from their public code: {name: (path, body)}.

Sources, all read in November 2026: home-assistant/core (openai_conversation/entity.py, ollama/entity.py), open-webui
(utils/payload.py), continuedev/continue (core/llm/llms/OpenAI.ts, Ollama.ts, LlamaCpp.ts), aider (sends through
litellm), langchain-openai and langchain-ollama (chat_models.py).
"""

from __future__ import annotations

from typing import Any

NAMES = {"name": {"type": "string"}, "area": {"type": "string"}, "floor": {"type": "string"}}
DOMAINS = {"domain": {"type": "array", "items": {"type": "string"}}}
CLASSES = {"device_class": {"type": "array", "items": {"type": "string", "enum": ["outlet", "switch", "blind"]}}}
HOUSE = {
    "HassTurnOn": {**NAMES, **DOMAINS, **CLASSES},
    "HassTurnOff": {**NAMES, **DOMAINS, **CLASSES},
    "HassLightSet": {
        **NAMES,
        **DOMAINS,
        "color": {"type": "string"},
        "temperature": {"type": "integer", "minimum": 0},
        "brightness": {"type": "integer", "minimum": 0, "maximum": 100, "description": "The percentage of the light"},
    },
    "HassClimateSetTemperature": {"temperature": {"type": "number"}, **NAMES},
    "HassSetPosition": {**NAMES, "position": {"type": "integer", "minimum": 0, "maximum": 100}},
    "GetLiveContext": {},
}
FUNCTIONS: list[dict[str, Any]] = [
    {
        "name": name,
        "parameters": {"type": "object", "properties": properties, "required": []},
        "description": f"Intent {name} of the house",
    }
    for name, properties in HOUSE.items()
]
TOOLS = [{"type": "function", "function": function} for function in FUNCTIONS]
HOUSE_PROMPT = "You are a voice assistant for Home Assistant.\nAnswer in plain text. Keep it simple and to the point.\n"
HOUSE_PROMPT += (
    "Static Context: An overview of the areas and the devices in this smart home:\n- names: Lamp\n  domain: light"
)
ASKED, CALLED = "Turn on the lamp", {"name": "Lamp", "domain": ["light"]}
RESULT = '{"speech": {}, "response_type": "action_done", "data": {"success": [{"name": "Lamp", "type": "entity"}]}}'
TASK = {
    "type": "object",
    "properties": {"room": {"type": "string", "enum": ["den", "hall"]}, "note": {"type": ["string", "null"]}},
    "required": ["room", "note"],
    "strict": True,
    "additionalProperties": False,
}

DEVELOPER = {"type": "message", "role": "developer", "content": HOUSE_PROMPT}
QUESTION = {"type": "message", "role": "user", "content": ASKED}
HOUSE_RESPONSE: dict[str, Any] = {
    "model": "tiny",
    "input": [DEVELOPER, QUESTION],
    "max_output_tokens": 300,
    "top_p": 1.0,
    "temperature": 1.0,
    "user": "01KB0V5F5JN3W0R6C9X1V8N2QD",
    "store": False,
    "stream": True,
    "tools": [{"type": "function", **function, "strict": False} for function in FUNCTIONS],
}
CALL_ITEM = {"type": "function_call", "name": "HassTurnOn", "arguments": '{"name": "Lamp"}', "call_id": "call_1"}
RESULT_ITEM = {"type": "function_call_output", "call_id": "call_1", "output": RESULT}

HOUSE_CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "system", "content": HOUSE_PROMPT}, {"role": "user", "content": ASKED}],
    "tools": TOOLS,
    "stream": True,
    "keep_alive": -1,
    "options": {"num_ctx": 8192},
    "think": False,
}
OLLAMA_TURN = [
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "HassTurnOn", "arguments": CALLED}}]},
    {"role": "tool", "content": RESULT},
]

CHAT = [{"role": "user", "content": "Why is the sky blue?"}]
LONGER = [
    {"role": "system", "content": "Act as an expert software developer."},
    *({"role": "user", "content": "I switched to a new code base."}, {"role": "assistant", "content": "Ok."}),
    {"role": "user", "content": "Here are summaries of some files:\n\nmain.py:\n|def main()\n"},
    {"role": "assistant", "content": "Ok, I won't try and edit those files without asking first."},
    {"role": "user", "content": "rename main to run"},
]
CACHED = [
    {
        "role": each["role"],
        "content": [{"type": "text", "text": each["content"], "cache_control": {"type": "ephemeral"}}],
    }
    for each in LONGER
]
FIM = "<|fim_prefix|>def add(a, b):\n    return <|fim_suffix|>\n<|fim_middle|>"
FIM_STOPS = ["<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>"]
FIM_STOPS += ["<|file_sep|>", "<|im_start|>", "<|im_end|>", "/src/", "#- coding: utf-8", "```", "\n\n"]
WEATHER = {
    "name": "weather",
    "description": "How it is in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
WEATHER_CALL = {"type": "function", "id": "call_1", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}

RECORDED: dict[str, tuple[str, dict[str, Any]]] = {
    "Home Assistant, openai_conversation": ("/v1/responses", HOUSE_RESPONSE),
    "Home Assistant, openai_conversation, after a call": (
        "/v1/responses",
        {**HOUSE_RESPONSE, "input": [DEVELOPER, QUESTION, CALL_ITEM, RESULT_ITEM]},
    ),
    "Home Assistant, openai_conversation, a task": (
        "/v1/responses",
        {
            **{name: value for name, value in HOUSE_RESPONSE.items() if name != "tools"},
            "text": {"format": {"type": "json_schema", "name": "task", "schema": TASK}},
        },
    ),
    "Home Assistant, ollama": ("/api/chat", HOUSE_CHAT),
    "Home Assistant, ollama, after a call": (
        "/api/chat",
        {**HOUSE_CHAT, "messages": [*HOUSE_CHAT["messages"], *OLLAMA_TURN]},
    ),
    "Home Assistant, ollama, a task": (
        "/api/chat",
        {
            **{name: value for name, value in HOUSE_CHAT.items() if name not in ("tools", "think")},
            "format": {**TASK, "strict": True},
            "keep_alive": "3600s",
        },
    ),
    "Open WebUI, OpenAI": (
        "/v1/chat/completions",
        {"stream": True, "model": "tiny", "messages": CHAT, "stream_options": {"include_usage": True}},
    ),
    "Open WebUI, OpenAI, a title": (
        "/v1/chat/completions",
        {"model": "tiny", "messages": CHAT, "stream": False, "max_completion_tokens": 200},
    ),
    "Open WebUI, Ollama": (
        "/api/chat",
        {
            "model": "tiny:latest",
            "messages": CHAT,
            "stream": True,
            "options": {
                "temperature": 0.7,
                "top_p": 0.9,
                "seed": 1,
                "num_ctx": 2048,
                "num_predict": 64,
                "tfs_z": 1,
                "mirostat": 0,
                "mirostat_eta": 0.1,
                "mirostat_tau": 5.0,
            },
            "keep_alive": "5m",
        },
    ),
    "Open WebUI, Ollama, documents": ("/api/embed", {"model": "tiny:latest", "input": ["a", "b"], "truncate": True}),
    "Continue, OpenAI": (
        "/v1/chat/completions",
        {"messages": CHAT, "model": "tiny", "max_tokens": 64, "temperature": 0.5, "stream": True},
    ),
    "Continue, OpenAI, autocomplete": (
        "/v1/completions",
        {"model": "tiny", "max_tokens": 64, "temperature": 0.01, "stream": True, "stop": FIM_STOPS, "prompt": FIM},
    ),
    "Continue, Ollama": (
        "/api/chat",
        {
            "model": "tiny",
            "messages": CHAT,
            "options": {"num_predict": 64, "num_ctx": 8192, "temperature": 0.5},
            "keep_alive": 1800,
            "stream": True,
        },
    ),
    "Continue, Ollama, autocomplete": (
        "/api/generate",
        {
            "model": "tiny",
            "prompt": FIM,
            "raw": True,
            "options": {"temperature": 0.01, "num_predict": 64, "stop": FIM_STOPS, "num_ctx": 8192},
            "keep_alive": 1800,
            "stream": True,
        },
    ),
    "Continue, llama.cpp": (
        "/completion",
        {"prompt": FIM, "stream": True, "n_predict": 64, "stop": FIM_STOPS, "temperature": 0.01},
    ),
    "aider": ("/v1/chat/completions", {"model": "tiny", "messages": LONGER, "stream": True, "temperature": 0}),
    "aider, with cached prompts": (
        "/v1/chat/completions",
        {"model": "tiny", "messages": CACHED, "stream": True, "temperature": 0},
    ),
    "aider, Ollama": (
        "/api/chat",
        {"model": "tiny", "messages": LONGER, "options": {"temperature": 0, "num_ctx": 10240}, "stream": True},
    ),
    "LangChain, OpenAI": (
        "/v1/chat/completions",
        {"messages": CHAT, "model": "tiny", "stream": True, "stream_options": {"include_usage": True}},
    ),
    "LangChain, OpenAI, after a call": (
        "/v1/chat/completions",
        {
            "messages": [
                *CHAT,
                {"content": None, "role": "assistant", "tool_calls": [WEATHER_CALL]},
                {"content": "sunny", "role": "tool", "tool_call_id": "call_1"},
            ],
            "model": "tiny",
            "max_completion_tokens": 64,
            "tools": [{"type": "function", "function": WEATHER}],
            "parallel_tool_calls": False,
        },
    ),
    "LangChain, OpenAI, embeddings": (
        "/v1/embeddings",
        {"input": [[5, 6, 7], [8, 9]], "model": "tiny", "encoding_format": "base64"},
    ),
    "LangChain, Ollama": (
        "/api/chat",
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "Why is the sky blue?", "images": []}],
            "tools": [],
            "stream": True,
            "options": {"temperature": 0.8, "num_predict": 64},
        },
    ),
}
