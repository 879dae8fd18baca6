# Each target does all its own set-up, inside this folder (virtual environment .venv, everything else in build/).
#   make demo    train, kill a rank, restart, and show that the two runs are bit-identical (about 5 minutes)
#   make test    the whole test suite, on the installed wheel and on the checkout
#   make quick   the tests that take less than five seconds each
#   make check   ruff, pyright and the import rules
#   make environment  what test and check need, by one call of pip
#   make wheel   build/wheels/undertow-*.whl
#   make system  install what only root can (Slurm, MPIs, compilers), with apt-get and sudo
#   make clean   remove what the targets above made, but not the system's packages
# VENV=folder uses another virtual environment, PYTHON=python3.12 another interpreter, ARGS='-k ring -x' goes to pytest.

VENV ?= .venv
PYTHON ?=
ARGS ?=
export VENV PYTHON
TEST_EXTRAS = plots test mpi hf trl lightning deepspeed metrics object-store workloads

.PHONY: help demo test quick check environment wheel system clean

help:
	@sed -n 's/^#   //p' Makefile

demo:
	@.ci/setup plots
	@.ci/in-venv -m undertow demo $(ARGS)

test:
	@.ci/setup $(TEST_EXTRAS)
	@.ci/test $(ARGS)

quick:
	@.ci/setup $(TEST_EXTRAS)
	@.ci/in-venv -m pytest -q -m "not slow" $(ARGS)

check: environment
	@.ci/check

environment:
	@.ci/setup $(TEST_EXTRAS) check

wheel:
	@.ci/setup test
	@.ci/wheel

system:
	@.ci/system-packages

clean:
	rm -rf build undertow.egg-info .venv
