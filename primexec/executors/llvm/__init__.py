"""The LLVM executor: fuses prims into loops and compiles these with llvmlite; no C++ compiler is needed."""
