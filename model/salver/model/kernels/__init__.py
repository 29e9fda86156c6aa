"""The native kernel: products, attention and all between them for one step, in one call.

`source/` is C++ for x86-64 processors with AVX-512 (VNNI and bf16); `build` compiles it, `library`
calls it, `program` turns a model into what it runs. It is optional: where it is missing, or does not
know what a model needs, plain torch computes the same.

No torch here and in `build`: the front process builds.
"""
