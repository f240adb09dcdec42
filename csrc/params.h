// The parameters that Python passes to the launchers: plain structs, every field 8 bytes wide, in
// the order of adapterkern/backends/cuda/params.py. Python owns every check and every allocation.
#pragma once

#include <cstdint>

namespace adapterkern {

// TF32 is a precision of products: no tensor is stored in it.
enum DType : int64_t { kFloat32, kFloat16, kBFloat16, kTFloat32 };

enum Activation : int64_t {
  kGelu,
  kGeluTanh,
  kRelu,
  kSilu,
  kTanh,
  kSigmoid,
  kLeakyRelu,
  kIdentity,
};

enum Norm : int64_t { kNone, kLayer, kRms };

// Rows of contiguous elements, or a contiguous vector; `data` is null for an absent tensor.
struct View {
  void* data;
  int64_t dtype;   // DType
  int64_t stride;  // elements from one row to the next
};

// All structs begin with sizes, not with a view: of a choice between two views nvcc 13.0 always
// took the one at offset 0 (see `choose` in memory.cuh).

// Equations (1) to (4) and (16) to (18) of docs/math.md.
struct ForwardParams {
  int64_t num_tokens, hidden_size, bottleneck_size;
  View x, down_weight, up_weight;  // in: [T, H], [R, H], [H, R]
  View down_bias, up_bias;         // in or none: [R], [H]
  View residual, skip;             // in or none: [T, H]
  View scaling;                    // in or none: [1] or [H]
  View y, z;                       // out: [T, H], or none with a norm; [T, R] or none
  View norm_weight, norm_bias;     // in or none: [H]
  View normed, mean, rstd;         // out or none: [T, H]; [T] float32
  View partial;                    // work space of the split form: [S, T, kBlockR] float32
  int64_t num_splits;              // slices of H; 0 selects the row-block form
  int64_t features_per_split;
  int64_t output_splits;  // slices of H in the second kernel of the split form
  int64_t features_per_output_split;
  int64_t num_clusters;    // clusters of num_splits blocks; 0 selects one of the other forms
  int64_t cluster_tokens;  // tokens that a cluster works on at a time
  int64_t large_tiles;     // whether a block may have the 227 KB for large tiles
  int64_t shared_bytes;    // of a block, except in a cluster; what is too little becomes the least
  int64_t resident_clusters;  // of num_splits blocks, of the resident form; 0 selects another form
  int64_t activation;         // Activation
  int64_t compute_dtype;      // DType of both products' operands
  int64_t add_input;          // whether x is the residual
  int64_t channel_scaling;    // whether scaling is [H]
  int64_t norm;               // Norm of the output; with one the form is the cluster's
  int64_t cast_before_weight;
  int64_t eps, weight_offset;  // the bits of a float32 each
  alignas(8) float scale;      // used if there is no scaling tensor
};

// Equations (5) to (13) and (19) to (22) of docs/math.md.
struct BackwardParams {
  int64_t num_tokens, hidden_size, bottleneck_size;
  View x, dy, z;                         // in: [T, H], [T, H], [T, R]; out with a norm: dy
  View down_weight, up_weight, up_bias;  // in: [R, H], [H, R], [H] or none
  View scaling;                          // in or none: [1] or [H]
  View dx;                               // out or none: [T, H]
  View dz, a;                            // work space or none: [T, R]; a = act(z)
  View partial;                          // work space of the split form: [S, T, kBlockR] float32
  View sum_down, sum_up;                 // work space or none, float32: [S', R, H] each,
  View sum_down_bias, sum_up_bias;       // and [S', R], [S', H]; rows are padded to eights
  View d_down_weight, d_up_weight;       // out or none: [R, H], [H, R]
  View d_down_bias, d_up_bias;           // out or none: [R], [H]
  View d_scaling;                        // out or none: [H] float32
  View d_normed, d_stream, stream;       // in or none, with a norm: [T, H] without gaps
  View mean, rstd;                       // in or none: [T] float32
  View norm_weight;                      // in or none: [H]
  View sum_norm_weight, sum_norm_bias;   // work space or none, float32: [norm_blocks, H]
  View d_norm_weight, d_norm_bias;       // out or none: [H]
  // The form of the kernels of dz and dx, as in the forward.
  int64_t num_splits, features_per_split, output_splits, features_per_output_split;
  int64_t num_clusters, cluster_tokens, large_tiles, shared_bytes, resident_clusters;
  int64_t token_splits;  // slices of the tokens, S'; 0: no sums are needed
  int64_t tokens_per_split;
  int64_t token_stages;  // tiles of the tokens that are in shared memory at once
  int64_t norm_blocks;   // that share the tokens in the kernel of the norm
  int64_t activation, compute_dtype, add_input, channel_scaling;
  int64_t norm, cast_before_weight, weight_offset;
  alignas(8) float scale;
};

// Equation (24) of docs/math.md, in which every token takes the adapter of its slot.
struct GroupedForwardParams {
  int64_t num_tokens, hidden_size, bottleneck_size, slots;
  View x, down_weights, up_weights;          // in: [T, H], [S, R, H], [S, H, R]
  View down_biases, up_biases;               // in or none: [S, R], [S, H]
  View residual, skip;                       // in or none: [T, H]
  View scalings;                             // in or none: [S] float32
  View ranks;                                // in or none: [S] int32
  View token_slots, order, tiles;            // in: int32, the buffers of a routing
  View y, z;                                 // out: [T, H]; [T, R] or none
  View partial;                              // work space of rows: [num_splits, T, R] float32
  int64_t down_slot_stride, up_slot_stride;  // elements from one slot to the next
  int64_t num_tiles;                         // of the routing, that T tokens can take; 0: rows
  int64_t num_splits, features_per_split;    // slices of H, in both kernels of rows
  int64_t shared_bytes;                      // of a block of tiles
  int64_t activation, compute_dtype, add_input;
};

}  // namespace adapterkern
