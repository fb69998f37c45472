# Needs nothing but make and a Python 3.11 or 3.12; everything else goes into .venv.

USABLE := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
# Each is tried, not looked up: a shim may be there and its Python not.
FIND_PYTHON = for p in python3.12 python3.11 python3 \
	"$$(uv python find --no-project 3.12 2>/dev/null)"; do \
	$$p -c '$(USABLE)' 2>/dev/null && { command -v $$p; break; }; done
define NO_PYTHON
Python 3.11 or 3.12 with venv is needed, and none was found. One of these brings it:
  uv python install 3.12                   with uv (docs.astral.sh/uv)
  apt install python3.12 python3.12-venv   or dnf, brew install python@3.12
  pyenv install 3.12 && pyenv local 3.12   with pyenv
Then run make again.
endef
export NO_PYTHON
RUN := .venv/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt

# The versions that `make compat` checks.
VERSIONS = $(shell sed -n 's/^open-webui==//p' constraints.txt)

.PHONY: demo dist tour test faults soak fuzz cluster test-cluster compat bench bench-quick lint clean

# Without a Chromium, Playwright's own is tried once before the page's tests skip.
# Two processes, each with a server of its own, take one file after the other.
test: .venv/ready
	$(RUN) -m tests.stack.browser
	$(RUN) -m pytest --numprocesses 2 --dist loadfile

# All faults in all modes; the table goes into docs/reliability.md.
faults: .venv/ready
	MMC_FAULTS=all $(RUN) -m pytest tests/integration/test_faults.py

# A hundred at once, then a long mixed run; figures and a plot go into docs/.
MINUTES ?= 30
soak: .venv/ready
	$(RUN) -m benchmarks.soak --minutes $(MINUTES)

# New input for everything that reads what is foreign: make fuzz SECONDS=3600
SECONDS ?= 300
fuzz: .venv/ready
	FUZZ_SECONDS=$(SECONDS) $(RUN) -m pytest tests/unit/test_fuzz.py -o timeout=0

# The file, and the function as JSON with its panels in four more languages.
dist: .venv/ready
	$(RUN) -m release.dist

# The pictures of docs/tour.md, taken of the demo in Chromium.
tour: .venv/ready
	$(RUN) -m release.tour

demo: .venv/ready
	@exec $(RUN) -m tests.stack.demo

# These two need PostgreSQL, Redis and nginx: apt install postgresql redis-server nginx
cluster: .venv/ready
	@exec $(RUN) -m tests.cluster

# The first test has the start of everything in its time.
test-cluster: .venv/ready
	$(RUN) -m pytest tests/cluster -o timeout=360

compat: .venv/ready
	$(RUN) -m tests.compat $(VERSIONS)

bench: .venv/ready
	$(RUN) -m benchmarks

bench-quick: .venv/ready
	$(RUN) -m benchmarks --quick

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/black --check multi_model_conversation.py
	.venv/bin/mypy

# What is installed stands in pyproject.toml, its versions in constraints.txt. The
# largest comes first and alone: a download that breaks costs only its own step.
.venv/ready: constraints.txt
	@python=$$($(FIND_PYTHON)); [ -n "$$python" ] || { echo "$$NO_PYTHON" >&2; exit 1; }; \
	echo "Making .venv with $$python"; rm -rf .venv; $$python -m venv .venv
	@$(PIP) --upgrade pip
	@echo "Installing PyTorch (1 of 3)" && $(PIP) torch
	@echo "Installing Open WebUI (2 of 3; some minutes)" && $(PIP) open-webui
	@echo "Installing the test tools (3 of 3)" && $(PIP) --group dev
	@touch $@

clean:
	rm -rf .venv .demo dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
