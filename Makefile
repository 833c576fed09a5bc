# make demo   train both frameworks on a small set and draw the figure
# make test   run every test
# Each environment is made when it is first needed, and again when its requirements change.

PYTHON ?= python3
JITTOR := .venv-jittor/bin/python
TORCH := .venv-torch/bin/python
REAL := data/tiny-imagenet-200
DEMO_LOGS := logs/demo

.PHONY: demo test environments clean

environments: .venv-jittor/ready .venv-torch/ready

.venv-jittor/ready: requirements-jittor.txt
	$(PYTHON) -m venv --clear .venv-jittor
	$(JITTOR) -m pip install --quiet -r requirements-jittor.txt
	cd jittor_impl && ../$(JITTOR) -c "import models"
	touch $@

# NATTEN is optional: without a compiler for it, torch_impl computes na2d_av by itself.
.venv-torch/ready: requirements-torch.txt requirements-natten.txt
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
	$(JITTOR) jittor_impl/train.py $$options --epochs 3 --output $(DEMO_LOGS) && \
	$(TORCH) torch_impl/train.py $$options --epochs 3 --output $(DEMO_LOGS) && \
	$(TORCH) plot.py --logs $(DEMO_LOGS)

test: environments
	$(TORCH) tests/run.py $(JITTOR) $(TORCH)

clean:
	rm -rf .venv-jittor .venv-torch $(DEMO_LOGS) data/sample
