// One attention call, as Python hands it over. Strides count elements; the last axis of every tensor is contiguous.
#pragma once
#include <cstdint>

struct Problem {
  int64_t batch, heads, kv_heads, queries, keys, width, value_width;  // b h g q k d e
  const void *q, *k, *v;                                              // [b h q d], [b g k d], [b g k e]
  void *out;                                                          // [b q h e], contiguous
  int64_t q_stride[3], k_stride[3], v_stride[3];                      // of b, head and token
  // [b g 2] of one query without blocks: k and v are held flat, head after head, and this is the row at which column 0
  // of each head would lie, and the first column that it holds; null where strides say it all
  const int64_t *held;
  int64_t bfloat16, out_bfloat16;                                     // q, k and v are bfloat16, else float32; out is
  int64_t exact;  // weights are not to be rounded to bfloat16 before they meet values, whatever that costs
  float scale, softcap;   // what scaled scores are bounded by, as softcap * tanh(score / softcap); 0 where they are not
  // Each weight is made of its own score, and rows have no sum: 0 where they have one and weights are a softmax, 1 for the
  // sigmoid of score and shift, 2 for what is above 0 of that; with `mean` over the number of keys that the row sees.
  int64_t form, mean;
  float shift;
  const float *bias;      // [b|1 h|1 q|1 k] added to scores, or null; k without gaps
  int64_t bias_stride[3]; // of b, head and query, 0 where there is one for all
  const float *sink;      // [h] a logit without key or value for each head, or null
  const int32_t *ranges;  // [b|1 h|1 q n 2] half-open ranges of columns that each query sees; null, where one query
                          // for each head sees all
  int64_t range_count, range_stride[2];  // n; of b and head, 0 where there is one for all
  const uint8_t *picked;  // [b|1 h|1 k] the keys that one query for each head sees, in place of ranges, or null
  int64_t picked_stride[2];
  const uint8_t *table;  // [b|1 h|1 q|1 k] which of the keys in its ranges each query sees, or null for all
  int64_t table_stride[3];
  const uint8_t *blocks;  // [b|1 g|h|1 q/block k/block] which blocks are computed, or null for all
  int64_t block, block_cols, block_units, block_stride[2];
  const uint8_t *live;  // [b|1 q] which queries are text, or null for all
  int64_t live_stride;
  const int32_t *first_at;  // [b] the column of each text's first token, -1 where it is not here
  const float *carry;  // [b k c] columns that the weights are to be multiplied with, for all heads the same, or null
  int64_t carry_width;
  // statistics; null where nobody asked
  float *received, *entropy, *peak, *first, *distance;  // [b h k] [b h q] [b h q] [b h q] [b h reach]
  int32_t *place;                                                     // [b h q]
  float *carried;                                                     // [b q c], the mean over heads
  int64_t nearest, reach, q_first;  // the distance of slot 0, how many slots, and the column that query 0 stands at
  int64_t threads;
  // The way back. What each row had for a maximum and the inverse of its sum, or 0 and its share, is told on the way
  // there: [b h q 2], null where there is no way back.
  float *rows;
  const float *given;  // what the output is given
  int64_t given_stride[3];
  const float *columns;  // [b h k] what sums of received weights are given, or null
  float *to_q, *to_k, *to_v;  // [b q h d], [b g k d], [b g k e], contiguous; the last two begin as zeros
  float *to_bias;  // [b h q k], begins as zeros; null where the bias does not learn
  // Whether a bias goes by how far apart query and key are: rows are one query on from one another in [b|1 h|1 q+k-1], which
  // begins with the last query's, so their stride is -1; and so is to_bias.
  int64_t diagonal;
};
