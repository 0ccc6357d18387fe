# `make demo` and `make test` set up everything they need; both go through `make install`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: install demo test test-browser lint
install: $(VENV)/.installed

# torch first and pinned: a looser requirement would resolve to the multi-gigabyte CUDA build.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt holdfast/native/*.cpp holdfast/native/*.h
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -c constraints.txt setuptools wheel numpy
	$(PIP) -c constraints.txt --no-build-isolation -e ".[dev,plots,peft,privacy,serve,memory]"
	touch $@

demo: install
	$(BIN)/python -m holdfast.demo

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Uses a Chromium that is installed already, else fetches Playwright's own.
test-browser: install
	$(PIP) playwright
	command -v chromium || command -v google-chrome || $(BIN)/python -m playwright install chromium
	$(BIN)/python -m pytest -rs tests/longterm/service/test_web.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
