# The four commands a newcomer types. Each calls xtask, which does the set-up it needs.
.PHONY: up down test bench
up:    ; @cargo xtask up $(ARGS)
down:  ; @cargo xtask down $(ARGS)
test:  ; @cargo xtask test $(ARGS)
bench: ; @cargo xtask bench $(ARGS)
