"""Section 3: what a provider, a driver or a proxy says when it fails, fit to be shown.

It is shown to everybody in the chat and sent to the other models: plain words, without
keys, addresses, tags and stack traces.
"""

from typing import Any

import pytest

from tests.unit.plugin import mmc

KEY = "sk-proj-Ab12Cd34Ef56Gh78Ij90Kl12Mn34Op56"
HEX = "0123456789abcdef0123456789abcdef"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmN"
PYTHON_TRACE = f"""Traceback (most recent call last):
  File "/srv/gateway/app.py", line 12, in answer
    return client.post(url, headers={{"Authorization": "Bearer {KEY}"}})
           ^^^^^^^^^^^^^^^^
  File "/usr/lib/python3.11/site-packages/httpx/_client.py", line 914, in post
    raise exc
ValueError: The prompt is empty"""
NODE_TRACE = """TypeError: fetch failed
    at node:internal/deps/undici/undici:12345:11
    at async Server.answer (/srv/app/server.js:10:5)"""
JAVA_TRACE = """java.lang.IllegalStateException: No model is loaded
\tat com.example.gateway.Models.find(Models.java:41)
\tat com.example.gateway.Main.main(Main.java:7)
\t... 12 more"""
NGINX = """<html>
<head><title>502 Bad Gateway</title></head>
<body>
<center><h1>502 Bad Gateway</h1></center>
<hr><center>nginx/1.24.0 (Ubuntu)</center>
</body>
</html>
"""
CLOUDFLARE = """<!DOCTYPE html>
<!--[if lt IE 7]> <html class="no-js ie6 oldie" lang="en-US"> <![endif]-->
<head>
<title>Web server is down | 521: api.example.com</title>
<style>body{margin:0;padding:0}</style>
<script>(function(){if(!document.cookie){document.getElementById('x')}})();</script>
</head>
<body><div>Error code 521</div><span>Your IP: 203.0.113.7</span></body></html>"""
UNTITLED = """<!doctype html><html><head><style>h1 { color: red }</style>
<script src="/x.js">go("10.0.0.5")</script></head>
<body><h1>Service Unavailable</h1><p>Try again later.</p></body></html>"""

REDACTED: list[tuple[Any, str]] = [
    (
        {
            "error": {
                "message": f"Incorrect API key provided: {KEY}. You can find your API "
                "key at https://platform.openai.com/account/api-keys.",
                "type": "invalid_request_error",
                "code": "invalid_api_key",
            }
        },
        "Incorrect API key provided: (key). You can find your API key at (address).",
    ),
    (
        "Incorrect API key provided: sk-proj-********************wxYZ.",
        "Incorrect API key provided: (key).",
    ),
    ("Incorrect API key provided: my-team*ey1.", "Incorrect API key provided: (key)."),
    (
        {"error": {"message": "invalid x-api-key: sk-ant-api03-AbCd_EfGh-1234"}},
        "invalid x-api-key: (key)",
    ),
    ("The key gsk_AbCdEfGh1234 was revoked", "The key (key) was revoked"),
    ("No access for AIzaSyA1234567890abcdefg", "No access for (key)"),
    ("Invalid credentials: hf_AbCdEfGhIjKl", "Invalid credentials: (key)"),
    (f"Unknown subscription {HEX}", "Unknown subscription (key)"),
    (f"The token {JWT} has expired", "The token (key) has expired"),
    (f"Header Authorization: Bearer {JWT}", "Header Authorization: Bearer (key)"),
    (
        "rejected header: Authorization: Basic dXNlcjpodW50ZXIy",
        "rejected header: Authorization: Basic (key)",
    ),
    ("bad api_key='k3y-0f-0urs-123' here", "bad api_key=(key)' here"),
    (
        'Request failed: {"token": "abcd1234efgh", "model": "m"}',
        'Request failed: {"token": (key)", "model": "m"}',
    ),
    (
        "invalid dsn: user=app password=hunter host=db.internal",
        "invalid dsn: user=app password=(key) host=(address)",
    ),
    (
        "Cannot connect to host 10.0.0.5:11434 ssl:default "
        "[Connect call failed ('10.0.0.5', 11434)]",
        "Cannot connect to host (address) ssl:default "
        "Connect call failed ('(address)', 11434)",
    ),
    (
        "Cannot connect to host ollama:11434 ssl:default [Name or service not known]",
        "Cannot connect to host (address) ssl:default Name or service not known",
    ),
    (
        "Cannot connect to host llm.example.com:443 ssl:True",
        "Cannot connect to host (address) ssl:True",
    ),
    (
        'connection to server at "10.1.2.3", port 5432 failed: FATAL:  password '
        'authentication failed for user "webui"',
        'connection to server at "(address)", port 5432 failed: FATAL: password '
        'authentication failed for user "webui"',
    ),
    (
        "could not connect to postgresql://webui:hunter2@db:5432/webui",
        "could not connect to (address)",
    ),
    (
        "[Errno 111] Connect call failed ('::1', 5432, 0, 0)",
        "Errno 111 Connect call failed ('(address)', 5432, 0, 0)",
    ),
    (
        "webui:hunter2@db.internal refused the connection",
        "(address) refused the connection",
    ),
    ("dial tcp [2001:db8::8a2e:370:7334]:443: timeout", "dial tcp (address): timeout"),
    ("no route to fe80:0:0:0:1:2:3:4 from here", "no route to (address) from here"),
    (
        'Post "http://127.0.0.1:11434/api/chat": connection refused',
        'Post "(address)": connection refused',
    ),
    ("upstream localhost:8080 is down", "upstream (address) is down"),
    ("vllm-0.vllm.llm.svc is not there", "(address) is not there"),
    (
        "502, message='Bad Gateway', url='http://gateway.lan/v1/chat?key=abc'",
        "502, message='Bad Gateway', url='(address)'",
    ),
    (PYTHON_TRACE, "ValueError: The prompt is empty"),
    (
        f"Internal error\n{PYTHON_TRACE}",
        "Internal error ValueError: The prompt is empty",
    ),
    (NODE_TRACE, "TypeError: fetch failed"),
    (JAVA_TRACE, "java.lang.IllegalStateException: No model is loaded"),
    (NGINX, "502 Bad Gateway"),
    ({"detail": NGINX}, "502 Bad Gateway"),
    (CLOUDFLARE, "Web server is down | 521: api.example.com"),
    (UNTITLED, "Service Unavailable Try again later."),
    ({"error": {"message": {"detail": f"Bearer {KEY}"}}}, "Bearer (key)"),
]
READABLE = [
    'model "llama3.1:8b" not found, try pulling it first',
    "The model gpt-4o-mini-2024-07-18 does not exist",
    "Qwen2.5-VL-72B-Instruct-AWQ-Int4 is loading",
    "openrouter/meta-llama/llama-3.3-70b-instruct:free is rate-limited upstream",
    "qwen3:30b-a3b needs more memory (18.6 GiB) than is available (15.2 GiB)",
    "HTTP 503",
    "Try again at 12:30, or at 12:30:45.",
    "Open WebUI 0.12.4 or later is needed, this is 0.11",
    "Rate limit reached: Limit 30000, Used 29999, Requested 512. Try again in 1.2s.",
    "This model's maximum context length is 128000 tokens.",
    "max_tokens: 4096 is too large, max_tokens=2048 works",
    "Basic authentication is not supported here",
    "Invalid token: expected a value",
    "Unsupported key: messages.0.content",
    "You exceeded your current quota, please check your plan and billing details.",
    "std::bad_alloc",
    "ranges::iota and a :: b are no addresses",
    "Request 7f2c9a1e-4b7d-4c1e-9f53-2d1c0a9b8e7f was refused",
    "see #3, 50 % of $1.50 & more",
    "Error code: 429 - slow down",
    "sk- is how a key begins",
]


@pytest.mark.parametrize(("error", "text"), REDACTED)
def test_an_error_names_no_key_no_address_and_no_line_of_code(
    error: Any, text: str
) -> None:
    assert mmc.error_text(error) == text


@pytest.mark.parametrize("text", READABLE)
def test_plain_words_of_an_error_stay_as_they_are(text: str) -> None:
    assert mmc.error_text(text) == text


def test_what_is_redacted_stays_so_when_it_is_redacted_again() -> None:
    for _, text in REDACTED:
        assert mmc.error_text(text) == text
