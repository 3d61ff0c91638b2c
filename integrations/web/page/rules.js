// The rules in plain words, which numbers each uses, and which one "Play" moves.
const arxiv = (id, name) => ({ href: `https://arxiv.org/abs/${id}`, name: `${name}, arXiv ${id}` });

export const rules = {
  token_choice: {
    name: 'Tokens choose experts',
    words: 'Each token takes the K experts that it scores highest. This is the usual rule. Tokens choose alone, so a block reads many different experts.',
    uses: ['k'], play: 'k', sources: [arxiv('2412.19437', 'DeepSeek-V3')],
  },
  expert_choice: {
    name: 'Experts choose tokens',
    words: 'Each expert takes the tokens that score highest for it, all experts equally many. No expert is busier than another. The fewer tokens are still to be written, the more each expert takes: K experts a token at the end, a quarter of that at the start, but one token at least.',
    uses: ['k', 'mask'], play: 'mask', sources: [arxiv('2604.01622', 'EC-DLM')],
  },
  sequence_top: {
    name: 'The best pairs of all',
    words: 'The 32 times K highest scores of the whole block win, wherever they are. A token may get many experts, or none.',
    uses: ['k'], play: 'k', sources: [arxiv('2511.06494', 'SeqTopK')],
  },
  mass: {
    name: 'The block elects: share of votes',
    words: 'First the block elects experts: each token votes for its top K with their scores, and the fewest experts that together hold more than the share p of all votes are elected, at least the floor. Then each token takes its K best of those.',
    uses: ['k', 'p', 'floor'], play: 'p', sources: [arxiv('2605.30876', 'dMoE')],
  },
  capacity: {
    name: 'The block elects: highest score',
    words: 'First the block elects as many experts as the capacity says: those with the highest score that any of its tokens gives them. Then each token takes its K best of those.',
    uses: ['k', 'capacity'], play: 'capacity', sources: [{ href: 'https://github.com/coder543/minnow', name: 'LLaDA2.2, as the engine minnow runs it' }],
  },
  vote: {
    name: 'The block elects: most votes',
    words: 'First the block elects as many experts as the capacity says: those with the most votes of its tokens. Then each token takes its K best of those.',
    uses: ['k', 'capacity'], play: 'capacity', sources: [arxiv('2602.00879', 'DES')],
  },
  union: {
    name: 'The block elects: everyone’s first two',
    words: 'First the block elects every expert that is among the two highest of some token. Then each token takes its K best of those.',
    uses: ['k'], play: 'k', sources: [arxiv('2602.00879', 'DES'), arxiv('2511.02237', 'OEA')],
  },
  masked_union: {
    name: 'The block elects: first two of masked tokens',
    words: 'As before, but only tokens that are still to be written have a say. The others choose among what those elected. Where no token is left to be written, all experts stay.',
    uses: ['k', 'mask'], play: 'mask', sources: [arxiv('2602.08404', 'TEAM')],
  },
};
