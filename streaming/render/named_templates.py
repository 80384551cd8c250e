"""Chat templates that outgrow knows: well-known forms of dialogues, written anew.

The comment at the beginning names the special tokens that a template needs; they are added to the tokenizer. A template of
yours may begin with such a comment too.
"""

from __future__ import annotations

CHATML = r"""
{#- special tokens: <|im_start|> <|im_end|> -#}
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages and messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] + '\n\n' }}
    {%- endif %}
    {{- 'These functions may be called:\n<tools>\n' }}
    {%- for tool in tools %}
        {{- (tool | tojson) + '\n' }}
    {%- endfor %} {{- '</tools>\nA call is an object of name and arguments, written as JSON between <tool_call> and
    </tool_call>.<|im_end|>\n' }} {%- endif %} {%- for message in messages %} {%- if message['role'] == 'tool' %} {{-
    '<|im_start|>tool\n<tool_response>\n' + message['content'] + '\n</tool_response><|im_end|>\n' }} {%- elif not (tools and
    loop.first and message['role'] == 'system') %} {{- '<|im_start|>' + message['role'] + '\n' }} {%- if
    message['reasoning_content'] %} {{- '<think>\n' + message['reasoning_content'] + '\n</think>\n\n' }} {%- endif %} {{-
    message['content'] }} {%- for call in message['tool_calls'] or [] %} {{- '' if loop.first and not message['content'] else
    '\n' }} {{- '<tool_call>\n{"name": ' + (call['function']['name'] | tojson) }} {{- ', "arguments": ' +
    (call['function']['arguments'] | tojson) + '}\n</tool_call>' }} {%- endfor %} {{- '<|im_end|>\n' }} {%- endif %} {%-
    endfor %} {%- if add_generation_prompt %} {{- '<|im_start|>assistant\n' }} {%- endif %}
"""

LLAMA3 = r"""
{#- special tokens: <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> -#}
{{- '<|begin_of_text|>' }}
{%- if tools %}
    {{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
    {%- if messages and messages[0]['role'] == 'system' %}
        {{- (messages[0]['content'] | trim) + '\n\n' }}
    {%- endif %}
    {{- 'These functions may be called; a call is an object of name and parameters, written as JSON on a line:' }}
    {%- for tool in tools %}
        {{- '\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (tools and loop.first and message['role'] == 'system') %}
        {%- set role = 'ipython' if message['role'] == 'tool' else message['role'] %}
        {{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}
        {%- if message['reasoning_content'] %}
            {{- '<think>\n' + (message['reasoning_content'] | trim) + '\n</think>\n\n' }}
        {%- endif %}
        {{- message['content'] | trim }}
        {%- for call in message['tool_calls'] or [] %}
            {{- '' if loop.first and not (message['content'] | trim) else '\n' }}
            {{- '{"name": ' + (call['function']['name'] | tojson) }}
            {{- ', "parameters": ' + (call['function']['arguments'] | tojson) + '}' }}
        {%- endfor %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

MISTRAL = r"""
{#- special tokens: <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS] -#}
{{- '<s>' }}
{%- if tools %}
    {{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{%- set ns = namespace(system='') %}
{%- for message in messages %}
    {%- if message['role'] == 'system' and loop.first %}
        {%- set ns.system = message['content'] + '\n\n' %}
    {%- elif message['role'] == 'user' %}
        {{- '[INST] ' + ns.system + message['content'] + '[/INST]' }}
        {%- set ns.system = '' %}
    {%- elif message['role'] == 'assistant' %}
        {%- if message['reasoning_content'] %}
            {{- ' <think>\n' + message['reasoning_content'] + '\n</think>\n\n' + message['content'] }}
        {%- elif message['content'] or not message['tool_calls'] %}
            {{- ' ' + message['content'] }}
        {%- endif %}
        {%- for call in message['tool_calls'] or [] %}
            {{- '[TOOL_CALLS] [' if loop.first else ', ' }}
            {{- '{"name": ' + (call['function']['name'] | tojson) }}
            {{- ', "arguments": ' + (call['function']['arguments'] | tojson) }}
            {{- ', "id": ' + (call['id'] | tojson) if call['id'] }}
            {{- '}' + (']' if loop.last else '') }}
        {%- endfor %}
        {{- '</s>' }}
    {%- elif message['role'] == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + (message['content'] | tojson) }}
        {{- ', "call_id": ' + (message['tool_call_id'] | tojson) if message['tool_call_id'] }}
        {{- '}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('mistral has no place for a message of the role ' + message['role'] + ' here') }}
    {%- endif %}
{%- endfor %}
"""

SAIGA = r"""
{#- special tokens: <s> </s> -#}
{%- if tools %}
    {{- raise_exception('saiga has no functions that may be called') }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'tool' or message['tool_calls'] %}
        {{- raise_exception('saiga has no calls of functions') }}
    {%- endif %}
    {{- '<s>' + ('bot' if message['role'] == 'assistant' else message['role']) + '\n' }}
    {%- if message['reasoning_content'] %}
        {{- '<think>\n' + message['reasoning_content'] + '\n</think>\n\n' }}
    {%- endif %}
    {{- message['content'] + '</s>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<s>bot\n' }}
{%- endif %}
"""

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "saiga": SAIGA}
