// What one thread works with, and how the columns of a block are cut. Included after pack.h.

struct Run {  // consecutive columns
  int64_t column, width, at;  // `at`: where they stand in their chunk
};

struct Chunk {
  int64_t from, to, width;  // its runs, and its columns
};

struct Stretch {  // of a chunk
  int64_t from, to;
};

// What one thread works with.
struct Desk {
  Floats q;        // as the register tile multiplies it: pairs of bfloat16 take half the room
  Floats weights;  // that are wanted again, where others are pairs
  Floats out, scores, top, peak, reference;
  Floats sums, spreads;  // of each row, a vector of them
  Floats inverse;        // what a weight over a row's final maximum is multiplied with
  std::vector<int32_t> place;
  std::vector<const int32_t *> ranges;  // of each row
  std::vector<Run> runs;
  std::vector<Chunk> chunks;
  std::vector<std::pair<int64_t, int64_t>> seen;
  std::vector<Stretch> sees;   // of each row in whole panels, where in a chunk the columns stand that it sees
  std::vector<Stretch> tiles;  // of each register tile's rows, from a whole panel to behind the last such column
  Floats mean, mixed;  // of a chunk's weights over heads, and of what they carried
  Floats received, distance;  // of one block
};
