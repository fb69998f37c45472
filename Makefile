# Needs nothing but make and a Python 3.11 or 3.12; everything else goes into .venv.

USABLE := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
FIND_PYTHON = for p in python3.12 python3.11 python3; do \
	$$p -c '$(USABLE)' 2>/dev/null && { command -v $$p; break; }; done
TOOLS := aiohttp black hypothesis mypy openai playwright pytest pytest-asyncio \
	pytest-timeout python-socketio[asyncio-client] ruff
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check \
	-c .venv/constraints.txt
RUN := .venv/bin/python

.PHONY: demo test bench bench-quick lint clean

test: .venv/ready
	$(RUN) -m pytest

demo: .venv/ready
	@exec $(RUN) -m tests.stack.demo

bench: .venv/ready
	$(RUN) -m benchmarks

bench-quick: .venv/ready
	$(RUN) -m benchmarks --quick

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/black --check multi_model_conversation.py
	.venv/bin/mypy

.venv/ready: constraints.txt
	@python=$$($(FIND_PYTHON)); \
	[ -n "$$python" ] || { echo "Python 3.11 or 3.12 (with venv) is needed" >&2; exit 1; }; \
	echo "Making .venv with $$python"; rm -rf .venv; $$python -m venv .venv
	@sed 's/\[.*\]//' constraints.txt > .venv/constraints.txt
	@echo "Installing PyTorch (1 of 3)" && $(PIP) torch
	@echo "Installing Open WebUI (2 of 3; some minutes)" && $(PIP) open-webui
	@echo "Installing the test tools (3 of 3)" && $(PIP) $(TOOLS)
	@touch $@

clean:
	rm -rf .venv .demo .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
