# make demo   train both frameworks on a small set, draw the figure and what the network sees
# make align  show layer by layer and step by step that both compute the same
# make bench  time both frameworks, and the official operator, side by side
# make test   run every test, and make lint; make test-versions runs them on other versions:
#             those of torch_impl on a current PyTorch, those of jittor_impl on another Python;
#             make test-gpu runs those that compute on a GPU, which make test hides
# make gpu    check all of it on a GPU in ten minutes: right, and how fast (docs/gpu.md)
# make gpu-bundle   what make gpu needs on a machine without a network, below 60 MB
# make compile-cuda   compile all of the Jittor side for CUDA 13, on a machine with no GPU (15 minutes)
# Each environment is made when it is first needed, and again when its requirements change.

PYTHON ?= python3
OTHER_PYTHON ?= python3.12
JITTOR := .venv-jittor/bin/python
TORCH := .venv-torch/bin/python
NATTEN := natten==0.17.3
REAL := data/tiny-imagenet-200
DEMO_LOGS := logs/demo
# Jittor compiles itself while PyTorch is downloaded.
MAKEFLAGS += -j2

.PHONY: demo align bench lint test test-gpu gpu gpu-bundle test-versions compile-cuda environments python-version clean

environments: .venv-jittor/ready .venv-torch/ready

python-version:
	@$(PYTHON) -c "import sys, venv; v = sys.version_info[:2]; (3, 10) <= v <= (3, 12) or sys.exit( \
		'Python 3.10, 3.11 or 3.12 is needed, $(PYTHON) is %d.%d; make PYTHON=python3.11 ... chooses another' % v)"

.venv-jittor/ready: requirements-jittor.txt | python-version
	@echo "Making .venv-jittor; then Jittor compiles itself (some minutes)"
	$(PYTHON) -m venv --clear .venv-jittor
	$(JITTOR) -m pip install --quiet -r requirements-jittor.txt
	$(JITTOR) -c "import jittor_impl.models"
	touch $@

.venv-torch/ready: requirements-torch.txt | python-version
	@echo "Making .venv-torch (5 GB)"
	$(PYTHON) -m venv --clear .venv-torch
	$(TORCH) -m pip install --quiet --no-compile -r requirements-torch.txt
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
	$(TORCH) plot.py --logs $(DEMO_LOGS) && \
	$(JITTOR) jittor_impl/visualize.py cam --checkpoint $(DEMO_LOGS)/best.safetensors --output $(DEMO_LOGS)

align: environments
	@if [ -d $(REAL) ]; then options=""; else \
		[ -d data/sample ] || $(TORCH) data/prepare.py --sample || exit 1; \
		echo "make align: no data in $(REAL), so the drawn sample in data/sample"; \
		options="--data-dir data/sample --num-classes 5"; \
	fi; \
	$(TORCH) align.py --jittor-python $(JITTOR) --torch-python $(TORCH) $$options

# NATTEN is the official operator, which ours is compared with; nothing needs it. It has no wheels on
# PyPI and builds against the installed torch.
NATTEN_BUILD = PATH="$(CURDIR)/.venv-torch/bin:$$PATH" NATTEN_N_WORKERS=$$(nproc) \
	$(TORCH) -m pip install --quiet --no-build-isolation

.venv-torch/natten: .venv-torch/ready | .venv-torch/test
	@echo "Building NATTEN (some minutes)"
	$(TORCH) -m pip install --quiet "setuptools<70" wheel cmake ninja
	$(NATTEN_BUILD) $(NATTEN) || echo "NATTEN did not build; its tests and its times are left out"
	touch $@

# The same at its best: pip builds NATTEN's code for a CPU without optimisation and threads.
.natten-o3/ready: | .venv-torch/natten
	@echo "Building NATTEN once more, with optimisation (some minutes)"
	rm -rf .natten-o3
	CXXFLAGS="-O3 -march=native -fopenmp" $(NATTEN_BUILD) --no-cache-dir --no-deps --target .natten-o3 $(NATTEN) \
		|| echo "NATTEN did not build; make bench leaves it out"
	mkdir -p .natten-o3 && touch $@

bench: environments .venv-torch/natten .natten-o3/ready
	$(TORCH) bench.py --jittor-python $(JITTOR) --torch-python $(TORCH) --cold

.venv-jittor/test: .venv-jittor/ready
	$(JITTOR) -m pip install --quiet pytest
	touch $@

# Together with torch's own pin, so that torchvision is the one that fits.
.venv-torch/test: requirements-test.txt .venv-torch/ready
	$(TORCH) -m pip install --quiet -r requirements-torch.txt -r requirements-test.txt
	touch $@

lint: .venv-torch/test
	$(TORCH) -m ruff check .
	$(TORCH) -m ruff format --check .

test: lint .venv-jittor/test .venv-torch/test .venv-torch/natten
	$(TORCH) tests/run.py $(JITTOR) $(TORCH)

# The tests that compute, on a GPU, against the same values.
test-gpu: .venv-jittor/test .venv-torch/test
	OVERLOCK_DEVICE=cuda $(TORCH) tests/run.py $(JITTOR) $(TORCH)

gpu: .venv-jittor/test .venv-torch/test
	$(TORCH) tools/gpu_check.py --jittor-python $(JITTOR) --torch-python $(TORCH)

# For a machine whose PyTorch runs on Python GPU_PYTHON.
GPU_PYTHON ?= 3.12

gpu-bundle: | python-version
	$(PYTHON) tools/gpu_bundle.py --python-version $(GPU_PYTHON)

.venv-current/ready: requirements-torch.txt requirements-test.txt | python-version
	@echo "Making .venv-current: a current PyTorch (6 GB)"
	$(PYTHON) -m venv --clear .venv-current
	sed '/^torch==/d; /^numpy</d' requirements-torch.txt > .venv-current/requirements.txt
	.venv-current/bin/python -m pip install --quiet "torch>=2.14" -r .venv-current/requirements.txt -r requirements-test.txt
	touch $@

.venv-jittor-other/ready: requirements-jittor.txt
	@echo "Making .venv-jittor-other with $(OTHER_PYTHON); then Jittor compiles itself (some minutes)"
	$(OTHER_PYTHON) -m venv --clear .venv-jittor-other
	.venv-jittor-other/bin/python -m pip install --quiet -r requirements-jittor.txt pytest
	.venv-jittor-other/bin/python -c "import jittor_impl.models"
	touch $@

# Of prepare.py and plot.py, which no version of a framework concerns.
NO_FRAMEWORK := --ignore tests/test_prepare.py --ignore tests/test_plot.py

test-versions: .venv-current/ready .venv-jittor-other/ready
	OVERLOCK_TESTS=torch .venv-current/bin/python -m pytest -q $(NO_FRAMEWORK) tests
	OVERLOCK_TESTS=jittor .venv-jittor-other/bin/python -m pytest -q $(NO_FRAMEWORK) tests

.venv-cuda/ready: requirements-jittor.txt requirements-cuda.txt | python-version
	@echo "Making .venv-cuda (3 GB)"
	$(PYTHON) -m venv --clear .venv-cuda
	.venv-cuda/bin/python -m pip install --quiet -r requirements-jittor.txt -r requirements-cuda.txt
	touch $@

compile-cuda: .venv-cuda/ready
	.venv-cuda/bin/python tests/compile_for_cuda.py

clean:
	rm -rf .venv-jittor .venv-torch .venv-jittor-other .venv-current .venv-cuda .natten-o3 $(DEMO_LOGS) data/sample
