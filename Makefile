# make demo   train both frameworks on a small set and draw the figure
# make align  show layer by layer and step by step that both compute the same
# make bench  time both frameworks, and the official operator, side by side
# make test   run every test; make test-current runs those of torch_impl on a current PyTorch
# make compile-cuda   compile all of the Jittor side for CUDA 13, on a machine with no GPU (some 15 minutes)
# Each environment is made when it is first needed, and again when its requirements change.

PYTHON ?= python3
JITTOR := .venv-jittor/bin/python
TORCH := .venv-torch/bin/python
REAL := data/tiny-imagenet-200
DEMO_LOGS := logs/demo

.PHONY: demo align bench test test-current compile-cuda environments python-version clean

environments: .venv-jittor/ready .venv-torch/ready

python-version:
	@$(PYTHON) -c "import sys, venv; v = sys.version_info[:2]; (3, 10) <= v <= (3, 12) or sys.exit( \
		'Python 3.10, 3.11 or 3.12 is needed, $(PYTHON) is %d.%d; make PYTHON=python3.11 ... chooses another' % v)"

.venv-jittor/ready: requirements-jittor.txt | python-version
	@echo "Making .venv-jittor; then Jittor compiles itself (some minutes)"
	$(PYTHON) -m venv --clear .venv-jittor
	$(JITTOR) -m pip install --quiet -r requirements-jittor.txt
	cd jittor_impl && ../$(JITTOR) -c "import models"
	touch $@

# NATTEN is optional: without a compiler for it, torch_impl computes na2d_av by itself.
.venv-torch/ready: requirements-torch.txt requirements-natten.txt | python-version
	@echo "Making .venv-torch (5 GB); then NATTEN is built (some minutes)"
	$(PYTHON) -m venv --clear .venv-torch
	$(TORCH) -m pip install --quiet -r requirements-torch.txt
	$(TORCH) -m pip install --quiet "setuptools<70" wheel cmake ninja
	PATH="$(CURDIR)/.venv-torch/bin:$$PATH" $(TORCH) -m pip install --quiet --no-build-isolation -r requirements-natten.txt \
		|| echo "NATTEN did not build; torch_impl uses its own na2d_av"
	touch $@

# Three short epochs in each framework: on the real data where it lies, else on a drawn sample.
demo: environments
	@if [ -d $(REAL) ]; then \
		echo "make demo: TinyImageNet in $(REAL), a tenth of each class"; \
		options="--data-dir $(REAL) --train-per-class 50 --val-per-class 10"; \
	else \
		[ -d data/sample ] || $(TORCH) data/prepare.py --sample || exit 1; \
		echo "make demo: no data in $(REAL), so the drawn sample in data/sample"; \
		options="--data-dir data/sample --num-classes 5 --train-per-class 64 --val-per-class 16 -b 16"; \
	fi; \
	rm -rf $(DEMO_LOGS); \
	$(JITTOR) jittor_impl/train.py $$options --epochs 3 --output $(DEMO_LOGS) && \
	$(TORCH) torch_impl/train.py $$options --epochs 3 --output $(DEMO_LOGS) && \
	$(TORCH) plot.py --logs $(DEMO_LOGS)

# The official operator at its best, beside what pip makes of it: NATTEN leaves its CPU code without optimisation and threads.
.natten-o3/ready: requirements-natten.txt | .venv-torch/ready
	@echo "Building NATTEN once more, with optimisation (some minutes)"
	rm -rf .natten-o3
	CXXFLAGS="-O3 -march=native -fopenmp" NATTEN_N_WORKERS=$$(nproc) PATH="$(CURDIR)/.venv-torch/bin:$$PATH" $(TORCH) -m pip install \
		--quiet --no-cache-dir --no-deps --no-build-isolation --target .natten-o3 -r requirements-natten.txt \
		|| echo "NATTEN did not build; make bench leaves it out"
	mkdir -p .natten-o3 && touch $@

bench: environments .natten-o3/ready
	$(TORCH) bench.py --jittor-python $(JITTOR) --torch-python $(TORCH) --cold

align: environments
	@if [ -d $(REAL) ]; then options=""; else \
		[ -d data/sample ] || $(TORCH) data/prepare.py --sample || exit 1; \
		echo "make align: no data in $(REAL), so the drawn sample in data/sample"; \
		options="--data-dir data/sample --num-classes 5"; \
	fi; \
	$(TORCH) align.py --jittor-python $(JITTOR) --torch-python $(TORCH) $$options

test: environments
	$(TORCH) tests/run.py $(JITTOR) $(TORCH)

.venv-current/ready: requirements-torch-current.txt | python-version
	$(PYTHON) -m venv --clear .venv-current
	.venv-current/bin/python -m pip install --quiet -r requirements-torch-current.txt
	touch $@

test-current: .venv-current/ready
	OVERLOCK_TESTS=torch .venv-current/bin/python -m pytest -q -rs tests

.venv-cuda/ready: requirements-jittor.txt requirements-cuda.txt | python-version
	@echo "Making .venv-cuda (3 GB)"
	$(PYTHON) -m venv --clear .venv-cuda
	.venv-cuda/bin/python -m pip install --quiet -r requirements-jittor.txt -r requirements-cuda.txt
	touch $@

compile-cuda: .venv-cuda/ready
	.venv-cuda/bin/python tests/compile_for_cuda.py

clean:
	rm -rf .venv-jittor .venv-torch .venv-current .venv-cuda .natten-o3 $(DEMO_LOGS) data/sample
