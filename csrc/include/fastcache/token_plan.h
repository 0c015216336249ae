// What one call of an operator on tokens has to do, as plain numbers and pointers (see plan.h).
#pragma once

#include "fastcache/plan.h"

namespace fastcache {

// select_tokens_: strides in elements.
struct SelectPlan {
  int64_t N = 0, capacity = 0;
  const float* score = nullptr;
  int64_t score_row = 0, score_token = 0;
  int32_t* age = nullptr;  // written
  int64_t age_row = 0, age_token = 0;
  const int32_t* counts = nullptr;
  int64_t counts_stride = 0;
  int32_t* slots = nullptr;  // [R, N] contiguous; holds the keys of a row until its tokens are chosen
  int32_t* index = nullptr;  // [R, capacity] contiguous
  float age_weight = 0.0f, bonus = 0.0f;
  bool aged = false, normalize = false;
  int64_t width = 0, cell = 0;
};

// row_score: a row is a token. value_norm: `heads` rows make a token, `head` bytes apart.
struct ScorePlan {
  int64_t B = 0, N = 0, D = 0;
  Rows x;
  Rows reference;  // no data: the norm of x
  bool by_heads = false;
  int64_t heads = 0, head = 0;
  float* out = nullptr;  // [B, N] contiguous
};

// relative_error: newest[l] beside earlier[k * layers + l], in blocks of rows.
struct ErrorPlan {
  int64_t N = 0, D = 0, rows = 0;  // rows = B * N of one tensor
  int64_t layers = 0, lookaheads = 0;
  const Rows* newest = nullptr;
  const Rows* earlier = nullptr;
  int64_t blocks_per_layer = 0;  // a block of kErrorRows rows of one layer is the work unit
  double* sums =
      nullptr;  // [layers, blocks_per_layer, 1 + lookaheads]: sum|newest|, then sum|earlier - newest|
};

// attention_received: strides of q, k in bytes, of lse in elements.
struct AttentionPlan {
  int64_t B = 0, H = 0, N = 0, M = 0, d = 0;
  Rows q, k;  // of head 0
  int64_t q_head = 0, k_head = 0;
  const float* lse = nullptr;
  int64_t lse_batch = 0, lse_head = 0, lse_row = 0;
  float factor = 1.0f;        // scale * log2(e)
  double* partial = nullptr;  // [B, H, M]
};

constexpr int64_t kAttentionKeys = 256;  // of a block
constexpr int64_t kErrorRows = 16;
constexpr int64_t kScoreTile = 64;

}  // namespace fastcache
