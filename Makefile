# SPDX-License-Identifier: MIT
PYTHON ?= python3
PORT ?= 8443
VENV ?= .venv
CERT = certs/localhost.pem
KEY = certs/localhost-key.pem

help:  ## show this
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## */:/' | awk -F: '{printf "  make %-8s %s\n", $$1, $$2}'
	@echo "Variables: PYTHON=$(PYTHON) PORT=$(PORT)"

run: certs  ## make what is missing, and start the receiver on PORT
	@exec $(PYTHON) receiver.py --port $(PORT)

test: certs $(VENV)/made  ## run all tests, in a virtual environment of their own
	@$(VENV)/bin/python -m pytest -q test_receiver.py

certs:  ## make a self-signed certificate for localhost, unless there is a valid one
	@if openssl x509 -checkend 86400 -noout -in $(CERT) >/dev/null 2>&1 && test -s $(KEY); then exit 0; fi; \
	command -v openssl >/dev/null || { echo "openssl is missing: install it, it makes the certificate" >&2; exit 1; }; \
	mkdir -p certs && umask 077 && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 365 \
	  -subj /CN=localhost -addext "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1" \
	  -keyout $(KEY) -out $(CERT) 2>certs/openssl.log || { cat certs/openssl.log >&2; exit 1; }; \
	rm -f certs/openssl.log; chmod 644 $(CERT); echo "Made $(CERT), valid for a year, for localhost, 127.0.0.1 and ::1"

send:  ## post every sample call to the receiver that runs on PORT
	@command -v curl >/dev/null || { echo "curl is missing: install it, it sends the calls" >&2; exit 1; }
	@for call in identify track page group; do \
	  printf '%-9s' $$call; curl -sS --cacert $(CERT) -u segment: https://localhost:$(PORT)/ \
	    -H 'Content-Type: application/json' -d @fixtures/$$call.json -w '%{http_code}\n' || exit 1; \
	done

clean:  ## remove what was made, but for the stored calls
	rm -rf $(VENV) $(CERT) $(KEY) __pycache__ .pytest_cache

$(VENV)/made: Makefile
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check pytest==9.2.0 requests==2.34.2
	@touch $@

.PHONY: help run test certs send clean
