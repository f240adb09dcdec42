// The facts of csrc/facts.h for ctypes: numbers in the order of its fields, those of a list after
// the number of its elements. Returns how many numbers there are; `room` holds at least as many.
#include "facts.cu"

template <typename Fact>
static int64_t* write_list(int64_t* to, const std::vector<Fact>& list) {
  *to++ = static_cast<int64_t>(list.size());
  std::memcpy(to, list.data(), list.size() * sizeof(Fact));
  return to + list.size() * sizeof(Fact) / sizeof(int64_t);
}

extern "C" void launch_facts(int64_t* room) {
  const adapterkern::Facts facts = adapterkern::launch_facts();
  *room++ = facts.panel;
  *room++ = facts.most_stages;
  room = write_list(room, facts.row_blocks);
  room = write_list(room, facts.grouped);
  room = write_list(room, facts.clusters);
  room = write_list(room, facts.gradients);
  std::memcpy(room, &facts.resident, sizeof(facts.resident));
}
