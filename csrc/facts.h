// What a plan of launches has to know of the compiled kernels, written once: in their shapes.
#pragma once

#include <cstdint>
#include <vector>

namespace adapterkern {

// One shape of the row-block and split forms, as adapterkern/backends/cuda/launch_config.py reads
// it.
struct RowBlockFacts {
  int64_t half;           // whether its products are in half precision
  int64_t width;          // the widest bottleneck that it holds
  int64_t large;          // whether its tiles need the 227 KB of a block on 9.0 and 10.x
  int64_t tokens;         // of a block
  int64_t threads;        // of a block
  int64_t blocks_per_sm;  // for which a thread has registers
  int64_t least_bytes;    // of shared memory
  int64_t in_bytes;       // of one stage of the pipeline into the bottleneck
  int64_t out_bytes;      // of one stage of the pipeline out of it, without tiles to add
  int64_t added_bytes;  // of a tile to add in such a stage; float32 rows beside half: twice as many
  int64_t beside_bytes;  // of what stays beside those stages
};

// One shape of the cluster form.
struct ClusterFacts {
  int64_t width, tokens, threads;
  int64_t panel_bytes;       // of shared memory for each panel of features
  int64_t beside_bytes;      // and beside them
  int64_t norm_panel_bytes;  // both with a norm, in addition
  int64_t norm_beside_bytes;
};

// One shape of the weight gradients: its tile, and the shared memory of one stage.
struct GradientFacts {
  int64_t half, units, features, stage_bytes;
};

// The one shape of the resident form.
struct ResidentFacts {
  int64_t width, tokens, threads;
  int64_t tile_bytes;                 // of a slot of rows or of a weight
  int64_t panel_bytes, beside_bytes;  // beside the slots: for each panel of features, and for all
  int64_t slots_in, slots_out;        // of the weights
  int64_t slots_out_beside;           // if rows other than the product's are added
};

struct Facts {
  int64_t panel;        // features; slices of H in a cluster are multiples of it
  int64_t most_stages;  // of a pipeline
  std::vector<RowBlockFacts> row_blocks;
  std::vector<RowBlockFacts> grouped;  // the shapes of the tiles of many adapters
  std::vector<ClusterFacts> clusters;
  std::vector<GradientFacts> gradients;
  ResidentFacts resident;
};

Facts launch_facts();

}  // namespace adapterkern
