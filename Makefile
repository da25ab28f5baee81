# Two commands do everything: `make figures` and `make test`. Each makes the environment in .venv/ on first use.
PYTHON ?= python3
PROFILE ?= quick
SET ?= paper
# What a user may set reaches the commands through the shell's environment, whatever quotes and spaces are in it.
export PYTHON PROFILE SET ONLY PARAMETER JOBS OUT SCHEDULER AGAINST DEVICE ARGS
RUN = "$$("$$PYTHON" -m dlm_core env)" -m dlm_core

.PHONY: help figures verify test site assignment assignment-check lab bench flower env clean

help:
	@echo 'make figures   the figures and tables of a set of notebooks, into figures/   PROFILE=smoke|quick|paper  SET=paper|beyond|all'
	@echo '                                                       ONLY=01 (one notebook)  JOBS=n  OUT=folder  SCHEDULER=tcp://…'
	@echo '                                                       ONLY=03 PARAMETER="seeds=20 errors=[0.5,1.0,2.0]" (instead of the profile’s)'
	@echo '                                                       DEVICE=cuda (attacks there, many at once)'
	@echo 'make verify    runs them once more and compares every number and verdict; PROFILE, SET, ONLY, JOBS and OUT as above'
	@echo '                                                       AGAINST=folder (of figures, instead of figures/ for paper)'
	@echo 'make test      every notebook under the smoke profile, pytest, then nbval on these and on the lessons; a federation of Flower'
	@echo 'make site      the site of notebooks, figures, claims, course and reference, into build/site'
	@echo 'make assignment   the lessons for students and for nbgrader, into build/assignment; make assignment-check proves their tests'
	@echo 'make lab       JupyterLab on the notebooks             ARGS="--no-browser --port 9999" (handed on to Jupyter)'
	@echo 'make flower    a federation of Flower, in processes of its own, and its audit   PROFILE=smoke|quick'
	@echo 'make bench     seconds and memory of the attacks, ours beside the released settings; DEVICE=cuda: many at once there'
	@echo 'make env       the environment alone, in .venv/ (made on first use by all of these)'
	@echo 'make clean     remove build/, the store of finished trials and caches'
	@echo 'The same without make: python -m dlm_core --help'

figures: env
	@$(RUN) figures --profile "$$PROFILE" --set "$$SET" $(if $(ONLY),--only "$$ONLY") \
	  $(if $(PARAMETER),--parameter "$$PARAMETER") $(if $(JOBS),--jobs "$$JOBS") \
	  $(if $(OUT),--out "$$OUT") $(if $(SCHEDULER),--scheduler "$$SCHEDULER") $(if $(DEVICE),--device "$$DEVICE")

verify: env
	@$(RUN) verify --profile "$$PROFILE" --set "$$SET" $(if $(ONLY),--only "$$ONLY") $(if $(JOBS),--jobs "$$JOBS") \
	  $(if $(OUT),--out "$$OUT") $(if $(AGAINST),--against "$$AGAINST") $(if $(DEVICE),--device "$$DEVICE")

bench: env
	@$(RUN) bench $(if $(DEVICE),--device "$$DEVICE")

test site assignment assignment-check: env
	@$(RUN) $@

lab: env
	@$(RUN) lab -- $$ARGS

flower: env
	@$(RUN) flower --profile "$$PROFILE"

env:
	@"$$PYTHON" -m dlm_core env > /dev/null

clean:
	@"$$PYTHON" -m dlm_core clean
